//! `strftime_now` of chat templates: the date in a system prompt. In UTC, so that a prompt does
//! not depend on where the machine stands.

use minijinja::{Error, ErrorKind};
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Year, month from 0, and day of the month from 1, of a day counted from 1970-01-01.
fn date(mut day: u64) -> (u64, usize, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // The calendar repeats every 400 years.
    const CYCLE: u64 = 146_097;
    let mut year = 1970 + 400 * (day / CYCLE);
    day %= CYCLE;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 0;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1)
}

/// Formats `seconds` since 1970 with the codes of C's `strftime` that need no locale.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let day = seconds / 86_400;
    let (year, month, mday) = date(day);
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[(day + 4) as usize % 7];
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let written = match chars.next() {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{:02}", month + 1),
            Some('B') => write!(out, "{}", MONTHS[month]),
            Some('b') => write!(out, "{}", &MONTHS[month][..3]),
            Some('d') => write!(out, "{mday:02}"),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('H') => write!(out, "{hour:02}"),
            Some('I') => write!(out, "{:02}", (hour + 11) % 12 + 1),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('F') => write!(out, "{year}-{:02}-{mday:02}", month + 1),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => write!(out, "UTC"),
            Some('z') => write!(out, "+0000"),
            Some('%') => write!(out, "%"),
            code => {
                let code = code.map(String::from).unwrap_or_default();
                let what = format!("strftime_now: the code %{code} is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
        };
        // Writing to a String cannot fail.
        debug_assert!(written.is_ok());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        // From `date -u -d @N`.
        for (seconds, expected) in [
            (0, "Thursday 01 January 1970, 00:00:00 Thu 01 Jan 70"),
            (951_782_399, "Monday 28 February 2000, 23:59:59 Mon 28 Feb 00"),
            (951_782_400, "Tuesday 29 February 2000, 00:00:00 Tue 29 Feb 00"),
            (1_735_689_599, "Tuesday 31 December 2024, 23:59:59 Tue 31 Dec 24"),
            (4_107_542_400, "Monday 01 March 2100, 00:00:00 Mon 01 Mar 00"),
        ] {
            assert_eq!(strftime("%A %d %B %Y, %H:%M:%S %a %d %b %y", seconds).unwrap(), expected);
        }
        assert_eq!(
            strftime("%F %T|%Y-%m-%d|%I %p 100%%", 1_735_689_599).unwrap(),
            "2024-12-31 23:59:59|2024-12-31|11 PM 100%"
        );
        assert_eq!(strftime("%I%p", 0).unwrap(), "12AM");
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("%Q"));
        assert!(strftime("%", 0).is_err());
    }
}
