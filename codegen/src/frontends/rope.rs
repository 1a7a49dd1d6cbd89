//! Rotary embeddings as configs describe them: `rope_parameters` of transformers 5 (flat, or one
//! section per layer type), or `rope_theta` beside `rope_scaling` of the versions before.

use super::FrontendError;
use super::config::{Config, MAX_POSITIONS};
use tilec_ir::graph::{RopeScaling, RopeSpec};

/// Values of `rope_type` that are read. `factors` is not transformers': it carries the stored
/// factors of GGUF's `rope_freqs.weight` in `factors`, one per pair of dimensions.
const TYPES: &[&str] = &["default", "linear", "dynamic", "llama3", "yarn", "factors"];

/// Key of the part of a head that is rotated.
const PARTIAL: &str = "partial_rotary_factor";

/// The rotary embedding of one layer type.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The frequencies.
    pub spec: RopeSpec,
    /// Longest context that they are made for.
    pub context: usize,
}

/// Name in the graph of the rope of a layer type: `rope` if all layer types share one.
pub fn name(config: &Config, layer_type: &str) -> Result<String, FrontendError> {
    let nested = parameters(config)?.is_some_and(|parameters| parameters.is_nested());
    Ok(if nested { layer_type.to_string() } else { "rope".to_string() })
}

/// Reads the rope of layers of this type, over whole heads of `head_dim`, in a model of
/// `max_position_embeddings`.
pub fn parse<'a>(
    config: &Config<'a>,
    layer_type: &'a str,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<Rope, FrontendError> {
    partial(config)?;
    if let Some(parameters) = of_layers(config, layer_type)? {
        partial(&parameters)?;
    }
    parse_dims(config, layer_type, head_dim, max_position_embeddings)
}

/// As [`parse`], but for families that may rotate the first part of a head, `partial_rotary_factor` of it.
pub fn parse_partial<'a>(
    config: &Config<'a>,
    layer_type: &'a str,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<Rope, FrontendError> {
    let own = of_layers(config, layer_type)?.filter(|own| own.has(PARTIAL)).unwrap_or(*config);
    let factor = own.positive(PARTIAL)?.unwrap_or(1.0);
    // Cut off, as transformers does it.
    let dims = (head_dim as f64 * factor) as usize;
    if dims < 2 || !dims.is_multiple_of(2) || dims > head_dim {
        let what = format!("{factor} of heads of {head_dim} is {dims} columns: no whole pairs within a head");
        return Err(own.error(PARTIAL, what));
    }
    parse_dims(config, layer_type, dims, max_position_embeddings)
}

/// The parameters of layers of a type, if there are any.
fn of_layers<'a>(config: &Config<'a>, layer_type: &'a str) -> Result<Option<Config<'a>>, FrontendError> {
    let Some(parameters) = parameters(config)? else { return Ok(None) };
    if !parameters.is_nested() {
        return Ok(Some(parameters));
    }
    let missing = || parameters.error(layer_type, "is missing, but the model has such layers");
    parameters.section(layer_type)?.ok_or_else(missing).map(Some)
}

/// Reads a rope over `head_dim` columns of a head.
fn parse_dims<'a>(
    config: &Config<'a>,
    layer_type: &'a str,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<Rope, FrontendError> {
    let Some(parameters) = of_layers(config, layer_type)? else {
        let spec = RopeSpec { dims: head_dim, theta: theta(config, config)?, scaling: RopeScaling::None };
        return Ok(Rope { spec, context: max_position_embeddings });
    };
    let nested = self::parameters(config)?.is_some_and(|parameters| parameters.is_nested());
    let theta = theta(config, &parameters)?;
    let mut context = max_position_embeddings;
    let kind_key = if parameters.has("rope_type") { "rope_type" } else { "type" };
    let scaling = match parameters.string(kind_key)?.unwrap_or("default") {
        "default" => RopeScaling::None,
        // The frequencies change once a sequence outgrows the trained context, which would change
        // keys that are already cached. Up to there they are the default ones.
        "dynamic" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: parameters.positive_required("factor")? },
        "llama3" => {
            let low_freq_factor = parameters.positive_required("low_freq_factor")?;
            let high_freq_factor = parameters.positive_required("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let what = format!("must be above low_freq_factor {low_freq_factor}, not {high_freq_factor}");
                return Err(parameters.error("high_freq_factor", what));
            }
            RopeScaling::Llama3 {
                factor: parameters.positive_required("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_context: original(config, &parameters, nested, max_position_embeddings)?,
            }
        }
        "yarn" => {
            let original_context = original(config, &parameters, nested, max_position_embeddings)?;
            let factor = match parameters.positive("factor")? {
                Some(factor) => factor,
                None => max_position_embeddings as f64 / original_context as f64,
            };
            // A config that was edited to reach further often keeps its max_position_embeddings.
            context = context.max((original_context as f64 * factor) as usize).min(MAX_POSITIONS);
            yarn(&parameters, theta, factor, original_context)?
        }
        "factors" => match parameters.positives("factors")? {
            Some(factors) if factors.len() == head_dim / 2 => RopeScaling::Factors { factors },
            Some(factors) => {
                let what = format!("has {} values for {} pairs of dimensions", factors.len(), head_dim / 2);
                return Err(parameters.error("factors", what));
            }
            None => return Err(parameters.error("factors", "is missing")),
        },
        other => {
            let what = format!("{other:?} is not supported: known are {}", TYPES.join(", "));
            return Err(parameters.error(kind_key, what));
        }
    };
    Ok(Rope { spec: RopeSpec { dims: head_dim, theta, scaling }, context })
}

fn yarn(
    parameters: &Config,
    theta: f64,
    factor: f64,
    original_context: usize,
) -> Result<RopeScaling, FrontendError> {
    if theta <= 1.0 {
        return Err(parameters.error("rope_theta", format!("yarn needs a base above 1, not {theta}")));
    }
    let magnitude = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    // As in transformers, 0 means "not given" for all of these.
    let given = |key: &str| Ok::<_, FrontendError>(parameters.number(key)?.filter(|number| *number != 0.0));
    let attention_factor =
        match (parameters.positive("attention_factor")?, given("mscale")?, given("mscale_all_dim")?) {
            (Some(attention_factor), _, _) => attention_factor,
            (None, Some(mscale), Some(all_dim)) => magnitude(mscale) / magnitude(all_dim),
            (None, _, _) => magnitude(1.0),
        };
    if !attention_factor.is_finite() || attention_factor <= 0.0 {
        return Err(parameters.error("mscale", format!("gives an attention factor of {attention_factor}")));
    }
    let beta_fast = given("beta_fast")?.unwrap_or(32.0);
    let beta_slow = given("beta_slow")?.unwrap_or(1.0);
    if beta_slow <= 0.0 || beta_fast < beta_slow {
        let what = format!("must be at least beta_slow {beta_slow}, which is above 0; it is {beta_fast}");
        return Err(parameters.error("beta_fast", what));
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        original_context,
        attention_factor,
        truncate: parameters.bool_or("truncate", true)?,
    })
}

/// `rope_scaling` wins if both are given, as in transformers.
fn parameters<'a>(config: &Config<'a>) -> Result<Option<Config<'a>>, FrontendError> {
    match config.section("rope_scaling")? {
        Some(section) => Ok(Some(section)),
        None => config.section("rope_parameters"),
    }
}

/// The base: of the parameters, else of the config, else 10000.
fn theta(config: &Config, parameters: &Config) -> Result<f64, FrontendError> {
    match parameters.positive("rope_theta")? {
        Some(theta) => Ok(theta),
        None => Ok(config.positive("rope_theta")?.unwrap_or(10000.0)),
    }
}

/// The context of training. Beside flat parameters, the config's own key wins.
fn original(
    config: &Config,
    parameters: &Config,
    nested: bool,
    max_position_embeddings: usize,
) -> Result<usize, FrontendError> {
    const KEY: &str = "original_max_position_embeddings";
    let of_config = if nested { None } else { config.positions(KEY)? };
    match of_config {
        Some(original) => Ok(original),
        None => Ok(parameters.positions(KEY)?.unwrap_or(max_position_embeddings)),
    }
}

/// The families here rotate whole heads.
fn partial(config: &Config) -> Result<(), FrontendError> {
    match config.number(PARTIAL)? {
        Some(factor) if factor != 1.0 => {
            Err(config
                .error(PARTIAL, format!("{factor} is not supported: heads of this family rotate whole")))
        }
        _ => Ok(()),
    }
}
