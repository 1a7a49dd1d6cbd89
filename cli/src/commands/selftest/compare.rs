//! Comparisons of logits `[rows][cols]`: with a reference, and bit for bit. Neither takes NaN or
//! infinity for a number.

/// How far rows are from their references. A row's error is `rms(found - wanted) / rms(wanted)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deviation {
    /// Root of the mean square of the rows' errors.
    pub typical: f64,
    /// The largest error of a row.
    pub worst: f64,
    /// Number of that row.
    pub row: usize,
}

/// The errors of rows, but for the `leave` largest.
///
/// # Errors
/// In words: if sizes differ or there are no rows, a value is not finite, or a row of the reference is
/// zero, so that nothing can be told from it.
pub fn deviation(found: &[f32], wanted: &[f32], cols: usize, leave: usize) -> Result<Deviation, String> {
    shapes(found, wanted, cols)?;
    finite("the result", found, cols)?;
    finite("the reference", wanted, cols)?;
    let mut errors = Vec::with_capacity(found.len() / cols);
    for (row, (found, wanted)) in found.chunks_exact(cols).zip(wanted.chunks_exact(cols)).enumerate() {
        let square = |x: f64| x * x;
        let size: f64 = wanted.iter().map(|x| square(f64::from(*x))).sum();
        let off: f64 = found.iter().zip(wanted).map(|(x, y)| square(f64::from(*x) - f64::from(*y))).sum();
        if size == 0.0 {
            return Err(format!("row {row} of the reference is zero"));
        }
        errors.push((off / size, row));
    }
    // The first row among equals.
    errors.sort_by(|(x, row), (y, other)| x.total_cmp(y).then(other.cmp(row)));
    errors.truncate(errors.len().saturating_sub(leave).max(1));
    let mean = errors.iter().map(|(error, _)| error).sum::<f64>() / errors.len() as f64;
    let (worst, row) = errors[errors.len() - 1];
    Ok(Deviation { typical: mean.sqrt(), worst: worst.sqrt(), row })
}

/// Whether two results have the same bits.
///
/// # Errors
/// In words: the first place where they differ, and how many rows do; or as [`deviation`].
pub fn same_bits(found: &[f32], wanted: &[f32], cols: usize) -> Result<(), String> {
    shapes(found, wanted, cols)?;
    finite("the result", found, cols)?;
    let total = found.len() / cols;
    let rows = found.chunks_exact(cols).zip(wanted.chunks_exact(cols)).enumerate();
    let differs = |(x, y): (&f32, &f32)| x.to_bits() != y.to_bits();
    let mut first = None;
    let mut count = 0;
    for (row, (found, wanted)) in rows {
        if let Some(col) = found.iter().zip(wanted).position(differs) {
            count += 1;
            first.get_or_insert((row, col, found[col], wanted[col]));
        }
    }
    match first {
        None => Ok(()),
        Some((row, col, found, wanted)) => Err(format!(
            "{count} of {total} rows differ, first row {row} in column {col}: {found:e} where there was {wanted:e}"
        )),
    }
}

/// The place of the first value that is NaN or infinite.
///
/// # Errors
/// In words.
pub fn finite(what: &str, values: &[f32], cols: usize) -> Result<(), String> {
    match values.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => {
            let bad = values.iter().filter(|x| !x.is_finite()).count();
            Err(format!(
                "{what} has {} in row {}, column {}, and {bad} values of {} that are not finite",
                values[at],
                at / cols,
                at % cols,
                values.len()
            ))
        }
    }
}

fn shapes(found: &[f32], wanted: &[f32], cols: usize) -> Result<(), String> {
    if cols == 0 || found.is_empty() || !found.len().is_multiple_of(cols) || found.len() != wanted.len() {
        return Err(format!("{} values where there should be {}, rows of {cols}", found.len(), wanted.len()));
    }
    Ok(())
}
