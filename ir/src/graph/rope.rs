//! Rotary position embeddings: frequencies as Hugging Face's `rope_parameters` describe them.

use serde::{Deserialize, Serialize};

/// How the frequencies are changed to reach beyond the context of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// As they are (`default`, and `dynamic` within the trained context).
    None,
    /// All divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, smooth between.
    Llama3 {
        /// Factor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are high frequencies.
        high_freq_factor: f64,
        /// Context of training.
        original_context: usize,
    },
    /// YaRN (arXiv 2309.00071), with the attention factor on cos and sin.
    Yarn {
        /// Context extension.
        factor: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which it is interpolated.
        beta_slow: f64,
        /// Context of training.
        original_context: usize,
        /// On cos and sin; already resolved from `attention_factor`, `mscale` or the factor.
        attention_factor: f64,
        /// Whether the correction range is rounded to whole dimensions (the usual).
        truncate: bool,
    },
    /// Frequencies divided by stored factors (GGUF's `rope_freqs`).
    Factors {
        /// One per pair of dimensions.
        factors: Vec<f32>,
    },
}

/// One rotary embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeSpec {
    /// Dimensions of a head that are rotated; even.
    pub dims: usize,
    /// Base.
    pub theta: f64,
    /// Scaling.
    pub scaling: RopeScaling,
}

impl RopeSpec {
    /// Whether the frequencies are defined: what [`RopeSpec::inv_freq`] relies on.
    ///
    /// # Errors
    /// In words, when the dimensions are odd or none, a number is not finite and positive, or the
    /// stored factors are not one per pair.
    pub fn check(&self) -> Result<(), String> {
        if self.dims == 0 || !self.dims.is_multiple_of(2) {
            return Err(format!("{} dims are not whole pairs", self.dims));
        }
        let positive = |what: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(format!("{what} {value} is not finite and positive")),
        };
        positive("theta", self.theta)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                positive("original_context", *original_context as f64)?;
                match low_freq_factor < high_freq_factor {
                    true => Ok(()),
                    false => Err("low_freq_factor is not below high_freq_factor".into()),
                }
            }
            RopeScaling::Yarn {
                factor, beta_fast, beta_slow, original_context, attention_factor, ..
            } => {
                positive("factor", *factor)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                positive("original_context", *original_context as f64)?;
                positive("attention_factor", *attention_factor)
            }
            RopeScaling::Factors { factors } => {
                if factors.len() != self.dims / 2 {
                    return Err(format!("{} factors for {} pairs", factors.len(), self.dims / 2));
                }
                factors.iter().try_for_each(|factor| positive("factor", f64::from(*factor)))
            }
        }
    }

    /// Inverse frequencies, one per pair of dimensions. Expects a spec that [`RopeSpec::check`] passes.
    pub fn inv_freq(&self) -> Vec<f32> {
        let pairs = self.dims / 2;
        let base = |pair: usize| self.theta.powf(-((2 * pair) as f64) / self.dims as f64);
        (0..pairs)
            .map(|pair| {
                let freq = base(pair);
                let scaled = match &self.scaling {
                    RopeScaling::None => freq,
                    RopeScaling::Linear { factor } => freq / factor,
                    RopeScaling::Factors { factors } => freq / f64::from(factors[pair]),
                    RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                        let context = *original_context as f64;
                        let wavelength = 2.0 * std::f64::consts::PI / freq;
                        if wavelength < context / high_freq_factor {
                            freq
                        } else if wavelength > context / low_freq_factor {
                            freq / factor
                        } else {
                            let smooth = (context / wavelength - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * freq / factor + smooth * freq
                        }
                    }
                    RopeScaling::Yarn {
                        factor, beta_fast, beta_slow, original_context, truncate, ..
                    } => {
                        let dim_of = |rotations: f64| {
                            self.dims as f64
                                * (*original_context as f64 / (rotations * 2.0 * std::f64::consts::PI)).ln()
                                / (2.0 * self.theta.ln())
                        };
                        let (mut low, mut high) = (dim_of(*beta_fast), dim_of(*beta_slow));
                        if *truncate {
                            (low, high) = (low.floor(), high.ceil());
                        }
                        let low = low.max(0.0);
                        let mut high = high.min(self.dims as f64 - 1.0);
                        if low == high {
                            high += 0.001;
                        }
                        let interpolated = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        freq / factor * interpolated + freq * (1.0 - interpolated)
                    }
                };
                scaled as f32
            })
            .collect()
    }

    /// Factor on cos and sin.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }
}
