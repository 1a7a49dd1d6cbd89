//! What conversions cost: how far weights are from what was stored, after they were packed in another
//! format than the checkpoint has.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use tilec_ir::convert::{ConvertError, PlaneView, dequantize};

/// Weights of one kind that were converted from one format to another.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversion {
    /// What they are: "experts" or "matrices".
    pub what: &'static str,
    /// Format in the checkpoint.
    pub from: String,
    /// Format that they were packed in.
    pub to: String,
    /// How many.
    pub weights: u64,
    /// Root mean square of the change, in units of the weights' own root mean square.
    pub relative_error: f64,
    /// Largest change of a weight.
    pub largest: f32,
}

impl fmt::Display for Conversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Conversion { what, from, to, weights, relative_error, largest } = self;
        let percent = relative_error * 100.0;
        write!(
            f,
            "{weights} weights of {what} from {from} to {to}: off by {percent:.2} % (root mean square), \
             at most {largest:.3e}"
        )
    }
}

/// Sums over the weights of a kind.
#[derive(Clone, Copy, Default)]
struct Sums {
    weights: u64,
    squares: f64,
    changes: f64,
    largest: f32,
}

/// Adds up what conversions cost, from any thread.
#[derive(Default)]
pub(crate) struct Ledger(Mutex<BTreeMap<(&'static str, String, String), Sums>>);

impl Ledger {
    /// Notes that `values` in format `from` became `converted`.
    ///
    /// # Errors
    /// If the planes do not have the size of the values.
    pub fn add(
        &self,
        what: &'static str,
        from: String,
        to: String,
        values: &[f32],
        converted: &PlaneView<'_>,
    ) -> Result<(), ConvertError> {
        let mut back = vec![0.0; values.len()];
        dequantize(converted, &mut back)?;
        let mut own = Sums { weights: values.len() as u64, ..Sums::default() };
        for (value, back) in values.iter().zip(&back) {
            let change = (value - back).abs();
            own.squares += f64::from(*value).powi(2);
            own.changes += f64::from(change).powi(2);
            own.largest = own.largest.max(change);
        }
        let mut sums = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let all = sums.entry((what, from, to)).or_default();
        all.weights += own.weights;
        all.squares += own.squares;
        all.changes += own.changes;
        all.largest = all.largest.max(own.largest);
        Ok(())
    }

    /// All that was noted.
    pub fn conversions(self) -> Vec<Conversion> {
        let sums = self.0.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        sums.into_iter()
            .map(|((what, from, to), sums)| Conversion {
                what,
                from,
                to,
                weights: sums.weights,
                relative_error: if sums.squares > 0.0 { (sums.changes / sums.squares).sqrt() } else { 0.0 },
                largest: sums.largest,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilec_ir::convert::quantize;
    use tilec_ir::format::Format;

    #[test]
    fn errors_are_relative_to_the_weights() {
        let ledger = Ledger::default();
        // Scale 1: 5 becomes 4 (a tie goes to the even code), the others stay.
        let mut values = vec![0.0f32; 32];
        values[..3].copy_from_slice(&[6.0, 5.0, -2.0]);
        let planes = quantize(Format::MXFP4, 1, 32, &values).unwrap();
        for _ in 0..2 {
            ledger.add("experts", "bf16".into(), "mxfp4".into(), &values, &planes.view()).unwrap();
        }
        let [conversion] = &ledger.conversions()[..] else { panic!("one kind") };
        assert_eq!((conversion.weights, conversion.largest), (64, 1.0));
        assert!((conversion.relative_error - (1.0f64 / 65.0).sqrt()).abs() < 1e-12);
        let text = conversion.to_string();
        assert_eq!(
            text,
            "64 weights of experts from bf16 to mxfp4: off by 12.40 % (root mean square), at most 1.000e0"
        );
    }
}
