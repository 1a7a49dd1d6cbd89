//! How many tokens a draft guesses at a time, chosen anew for every step.
//!
//! A guess costs a row of the step that verifies it, the first one a pass of the draft as well, and it adds a
//! token with the probability that it and all before it are right. Of each text the probabilities are counted
//! while it is written ([`Reach`]); of each number of rows the time is measured while steps run, and begins
//! as what the plan's cost model says ([`PassTimes`]). A row of a mixture brings experts of its own, a row on
//! a processor is work: so a longer block may lose, and no guess at all may be best. [`choose`] takes the
//! numbers of guesses with the most expected tokens a second. Whatever it takes, texts are the same.
//!
//! What was not measured for long is tried now and then, if it could be best: at least as long as fewer rows
//! take, and as long a row as more rows do.
//!
//! A text that is better off without guesses rests, and tries again after 32 tokens, then after 64, and so on
//! up to 1,024: so a draft that never helps costs next to nothing, and one that helps from some place on is
//! found.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tilec_ir::cost::StageCost;
use tilec_ir::plan::Plan;

/// Chance that a guess is right if those before it are, until something is known of a text: high, so that a
/// draft is tried wherever it may be worth it.
const PRIOR: f64 = 0.9;

/// Guesses that the prior counts as.
const PRIOR_WEIGHT: f64 = 2.0;

/// What is left of a count from one round to the next.
const DECAY: f64 = 0.97;

/// How much faster another choice must look before it is taken.
const GAIN: f64 = 1.03;

/// Tokens without guesses before the next try, at first and at most.
const REST: [usize; 2] = [32, 1024];

/// Passes that a measured mean remembers at most.
const MEMORY: f64 = 16.0;

/// What is left of a mean's weight when something was measured.
const FADE: f64 = 0.998;

/// Passes that what others say counts as.
const OTHERS: f64 = 0.25;

/// Measurements after which a time is old.
const OLD: u64 = 1024;

/// Choices from one trial to the next, at least.
const TRIALS: u64 = 8;

/// How many tokens are guessed at a time for a request, at most: none for 0.
///
/// Clones are one switch. Who keeps one may turn it while the request runs, from another thread or from the
/// callback; the next step (on a GPU, the next launch) goes by it. Turned on late, the draft first has to be
/// told of the text so far, which costs what reading it as a prompt costs; while it is off, a request costs
/// what it costs without a draft. Texts do not depend on it.
#[derive(Clone, Debug)]
pub struct DraftLimit(Arc<AtomicUsize>);

impl DraftLimit {
    /// Up to so many guesses at a time.
    pub fn new(guesses: usize) -> DraftLimit {
        DraftLimit(Arc::new(AtomicUsize::new(guesses)))
    }

    /// No guesses.
    pub fn off() -> DraftLimit {
        DraftLimit::new(0)
    }

    /// From now on up to so many guesses at a time.
    pub fn set(&self, guesses: usize) {
        self.0.store(guesses, Ordering::Relaxed);
    }

    /// Guesses at a time.
    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// As many as the generator allows.
impl Default for DraftLimit {
    fn default() -> DraftLimit {
        DraftLimit::new(usize::MAX)
    }
}

/// Work whose time decides about guesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// The draft guesses; rows of all blocks.
    Draft,
    /// A step of the model by itself, with guesses to verify or without.
    Step,
    /// One of many steps that a resident kernel takes in a launch.
    Launch,
    /// One of many rounds that a resident kernel takes in a launch: a block, and a step of so many rows.
    Round,
}

/// Times of passes by their rows, in place of measured ones: see [`super::Generator::set_pass_times`].
pub type FixedTimes = Arc<dyn Fn(Pass, usize) -> Duration + Send + Sync>;

/// How likely guesses of a text are right.
#[derive(Clone, Debug, Default)]
pub(super) struct Reach {
    /// Of each guess of a block, how often those before it were right, and how often it was, too. Older
    /// rounds count less.
    counts: Vec<[f64; 2]>,
}

impl Reach {
    /// Notes a round: of its first `tried` guesses all but perhaps the last were right, `right` in all.
    pub fn note(&mut self, tried: usize, right: usize) {
        if self.counts.len() < tried {
            self.counts.resize(tried, [0.0; 2]);
        }
        for (guess, [tries, hits]) in self.counts.iter_mut().enumerate() {
            *tries = *tries * DECAY + f64::from(u8::from(guess < tried));
            *hits = *hits * DECAY + f64::from(u8::from(guess < right));
        }
    }

    /// The chances that the first guess is right, that the first two are, and so on. Of a guess that was
    /// seldom tried, the one before it says most.
    pub fn chances(&self, guesses: usize) -> Vec<f64> {
        let (mut own, mut all) = (PRIOR, 1.0);
        let chance = |guess: usize| {
            let [tries, hits] = self.counts.get(guess).copied().unwrap_or_default();
            own = (hits + PRIOR_WEIGHT * own) / (tries + PRIOR_WEIGHT);
            all *= own;
            all
        };
        (0..guesses).map(chance).collect()
    }
}

/// What is known of a text for the choice.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    reach: Reach,
    /// Guesses of the round before.
    before: usize,
    /// Tokens until the next try; 0 while guesses are made.
    rest: usize,
    /// How long the last rest was.
    rested: usize,
    /// Seconds of the next round, and of a token without guesses.
    prices: [f64; 2],
    /// Seconds that guesses have saved since then.
    gain: f64,
}

impl Pace {
    pub fn new() -> Pace {
        Pace { reach: Reach::default(), before: usize::MAX, rest: 0, rested: 0, prices: [0.0; 2], gain: 0.0 }
    }

    /// Tokens to go without guesses; 0 if the text may have some.
    pub fn rest(&self) -> usize {
        self.rest
    }

    /// See [`Reach::chances`].
    pub fn chances(&self, guesses: usize) -> Vec<f64> {
        self.reach.chances(guesses)
    }

    /// Notes a round that added `tokens`: see [`Reach::note`].
    pub fn round(&mut self, tried: usize, right: usize, tokens: usize) {
        self.reach.note(tried, right);
        let [round, plain] = self.prices;
        self.gain += tokens as f64 * plain - round;
    }

    /// Notes tokens that came without guesses.
    pub fn plain(&mut self, tokens: usize) {
        if self.rest > 0 {
            self.rest = self.rest.saturating_sub(tokens);
            if self.rest == 0 {
                // What was known is about another place of the text.
                (self.reach, self.before, self.gain) = (Reach::default(), usize::MAX, 0.0);
            }
        }
    }

    /// Notes the choice.
    fn take(&mut self, guesses: usize) {
        self.before = guesses;
        if guesses == 0 {
            self.rested = if self.gain > 0.0 { REST[0] } else { (self.rested * 2).clamp(REST[0], REST[1]) };
            self.rest = self.rested;
        }
    }
}

/// Guesses that a sequence may have in the next step.
pub(super) struct Candidate<'a> {
    pub pace: &'a mut Pace,
    /// At least, as far as there is room.
    pub least: usize,
    /// At most, one or more.
    pub most: usize,
    /// Rows of its block in the draft's pass.
    pub rows: usize,
}

/// What else is in the next step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Company {
    /// Rows of sequences without guesses.
    pub rows: usize,
    /// Guesses that there is room for.
    pub room: usize,
    /// Whether many steps go into a launch if there are no guesses.
    pub launch: bool,
    /// Whether many rounds go into a launch if some sequence has guesses.
    pub rounds: bool,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chosen {
    /// Guesses of each candidate.
    pub guesses: Vec<usize>,
    /// Whether this is to measure a time: it says nothing of the next step.
    pub trial: bool,
}

/// What a step and its guesses bring and take.
struct Work {
    /// Expected.
    tokens: f64,
    seconds: f64,
    /// At best, if one of the times is old.
    least: Option<f64>,
}

impl Work {
    fn rate(&self) -> f64 {
        self.tokens / self.seconds
    }
}

/// How many guesses each candidate has: those with the most expected tokens a second.
pub(super) fn choose(candidates: &mut [Candidate<'_>], company: Company, times: &mut PassTimes) -> Chosen {
    times.choices += 1;
    let decode = candidates.len() + company.rows;
    let chances: Vec<Vec<f64>> =
        candidates.iter().map(|candidate| candidate.pace.chances(candidate.most)).collect();
    let plain = times.seconds(if company.launch { Pass::Launch } else { Pass::Step }, decode);
    let work = |guesses: &[usize]| {
        let (mut tokens, mut all, mut draft) = (decode as f64, 0, 0);
        for ((guesses, chances), candidate) in guesses.iter().zip(&chances).zip(&*candidates) {
            if *guesses > 0 {
                tokens += chances[..*guesses].iter().sum::<f64>();
                all += guesses;
                draft += candidate.rows;
            }
        }
        if all == 0 {
            return Work { tokens, seconds: plain, least: times.least(Pass::Step, decode) };
        }
        if company.rounds && times.fixed.is_none() {
            let (seconds, least) =
                (times.seconds(Pass::Round, decode + all), times.least(Pass::Round, decode + all));
            return Work { tokens, seconds, least };
        }
        let passes = [(Pass::Draft, draft), (Pass::Step, decode + all)];
        let [guess, verify] = passes.map(|(pass, rows)| (times.seconds(pass, rows), times.least(pass, rows)));
        let least = guess.1.unwrap_or(guess.0) + verify.1.unwrap_or(verify.0);
        let old = guess.1.or(verify.1).is_some();
        Work { tokens, seconds: guess.0 + verify.0, least: old.then_some(least) }
    };
    let fit = |wanted: &dyn Fn(&Candidate<'_>) -> usize| -> Vec<usize> {
        let mut room = company.room;
        let each = candidates.iter().map(|candidate| {
            let guesses = wanted(candidate).clamp(candidate.least, candidate.most).min(room);
            room -= guesses;
            guesses
        });
        each.collect()
    };
    // From the least on, the likeliest guess of all is added, and the next one, as far as they go.
    let mut guesses = fit(&|_| 0);
    let mut tried = vec![(work(&guesses), guesses.clone())];
    for _ in guesses.iter().sum::<usize>()..company.room {
        let next = |at: usize| chances[at].get(guesses[at]).map(|chance| (*chance, at));
        // The first among equals.
        let likeliest =
            (0..guesses.len()).filter_map(next).max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let Some((_, at)) = likeliest else { break };
        guesses[at] += 1;
        tried.push((work(&guesses), guesses.clone()));
    }
    let trial = tried
        .iter()
        .filter_map(|(work, guesses)| Some((work.tokens / work.least?, guesses)))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(rate, guesses)| (rate, guesses.clone()));
    let best = tried.into_iter().max_by(|(a, _), (b, _)| a.rate().total_cmp(&b.rate()));
    let Some((best, guesses)) = best else { return Chosen { guesses, trial: false } };
    if let Some((rate, guesses)) = trial
        && rate > best.rate() * GAIN
        && times.choices >= times.next_trial
    {
        times.next_trial = times.choices + TRIALS;
        return Chosen { guesses, trial: true };
    }
    let before = fit(&|candidate| candidate.pace.before);
    let as_before = work(&before);
    let stay = best.rate() < as_before.rate() * GAIN;
    let (taken, guesses) = if stay { (as_before, before) } else { (best, guesses) };
    for (candidate, guesses) in candidates.iter_mut().zip(&guesses) {
        candidate.pace.prices = [taken.seconds, plain].map(|seconds| seconds / decode as f64);
        candidate.pace.take(*guesses);
    }
    Chosen { guesses, trial: false }
}

/// How many times what the cost model says a pass takes: a mean that forgets.
#[derive(Clone, Copy, Debug)]
struct Mean {
    ratio: f64,
    weight: f64,
    /// Measurements when this was measured last.
    at: u64,
}

/// Times of passes by their rows.
pub(super) struct PassTimes {
    measured: BTreeMap<(Pass, usize), Mean>,
    /// Which passes ran.
    warm: Vec<Pass>,
    /// Measurements so far.
    notes: u64,
    /// Choices that were made, and when there may be a trial.
    choices: u64,
    next_trial: u64,
    model: CostModel,
    /// In place of all else.
    pub fixed: Option<FixedTimes>,
}

impl std::fmt::Debug for PassTimes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PassTimes").field("measured", &self.measured).finish_non_exhaustive()
    }
}

impl PassTimes {
    pub fn new(model: CostModel) -> PassTimes {
        PassTimes {
            measured: BTreeMap::new(),
            warm: Vec::new(),
            notes: 0,
            choices: 0,
            next_trial: 0,
            model,
            fixed: None,
        }
    }

    /// Notes how long a pass took.
    pub fn note(&mut self, pass: Pass, rows: usize, time: Duration) {
        if rows == 0 || time.is_zero() {
            return;
        }
        // The first one of all finds code and weights where nobody has touched them.
        if !self.warm.contains(&pass) {
            self.warm.push(pass);
            return;
        }
        let ratio = time.as_secs_f64() / self.model.seconds(pass, rows);
        let known = self.of(pass).next().is_some();
        // A pass that was held up says little; a first one has nothing to be compared with.
        let limit = if known { 3.0 * self.ratio(pass, rows) } else { f64::INFINITY };
        let ratio = ratio.min(limit);
        for mean in self.measured.values_mut() {
            mean.weight *= FADE;
        }
        self.notes += 1;
        let new = Mean { ratio, weight: 0.0, at: self.notes };
        let mean = self.measured.entry((pass, rows)).or_insert(new);
        if ratio * 2.0 < mean.ratio {
            // Those before were held up.
            *mean = new;
        }
        mean.at = self.notes;
        mean.weight = (mean.weight + 1.0).min(MEMORY);
        mean.ratio += (ratio - mean.ratio) / mean.weight;
    }

    /// Seconds that a pass takes. The longer a number of rows was not measured, the less counts what was;
    /// then it is what others say of the cost model.
    pub fn seconds(&self, pass: Pass, rows: usize) -> f64 {
        match &self.fixed {
            Some(fixed) => fixed(pass, rows).as_secs_f64().max(1e-9),
            None => self.model.seconds(pass, rows) * self.ratio(pass, rows),
        }
    }

    /// Seconds that the cost model says, whatever was measured.
    pub fn predicted(&self, pass: Pass, rows: usize) -> f64 {
        self.model.seconds(pass, rows)
    }

    /// The least that a pass may take, if what is known of its time is old or nothing: no less than fewer
    /// rows, no less a row than more rows; half of what the cost model says if no others were measured, but
    /// steps were.
    fn least(&self, pass: Pass, rows: usize) -> Option<f64> {
        let old = |mean: &Mean| self.notes > mean.at + OLD;
        if self.fixed.is_some() || self.measured.get(&(pass, rows)).is_some_and(|mean| !old(mean)) {
            return None;
        }
        let least = |(other, mean): (usize, &Mean)| {
            self.model.seconds(pass, other) * mean.ratio * rows.min(other) as f64 / other as f64
        };
        let others = self.of(pass).filter(|(other, _)| *other != rows).map(least).reduce(f64::max);
        others.or_else(|| Some(0.5 * self.model.seconds(pass, rows) * self.mean(Pass::Step)?))
    }

    fn of(&self, pass: Pass) -> impl Iterator<Item = (usize, &Mean)> {
        self.measured.range((pass, 0)..=(pass, usize::MAX)).map(|((_, rows), mean)| (*rows, mean))
    }

    /// What the cost model's prediction has to be multiplied with: by this number of rows, by others, of
    /// which the nearest say most, and by all steps.
    fn ratio(&self, pass: Pass, rows: usize) -> f64 {
        let base = match pass {
            // All that a launch saves is in the prediction.
            Pass::Launch if self.mean(Pass::Step).is_some() => self.ratio(Pass::Step, rows),
            _ => self.mean(Pass::Step).or_else(|| self.mean(pass)).unwrap_or(1.0),
        };
        let near = self.of(pass).filter(|(other, _)| *other != rows).map(|(other, mean)| {
            let apart = other.abs_diff(rows) as f64;
            (mean.ratio, mean.weight / (apart * apart))
        });
        let near = mean(near.chain([(base, OTHERS)])).unwrap_or(base);
        let own = self.measured.get(&(pass, rows)).map(|mean| (mean.ratio, mean.weight));
        mean(own.into_iter().chain([(near, OTHERS)])).unwrap_or(near)
    }

    /// Of a pass, whatever its rows.
    fn mean(&self, pass: Pass) -> Option<f64> {
        mean(self.of(pass).map(|(_, mean)| (mean.ratio, mean.weight)))
    }
}

/// The mean of numbers with weights.
fn mean(numbers: impl Iterator<Item = (f64, f64)>) -> Option<f64> {
    let (sum, all) =
        numbers.fold((0.0, 0.0), |(sum, all), (number, weight)| (sum + number * weight, all + weight));
    (all > 0.0).then(|| sum / all)
}

/// What passes take by the plan's costs: the start of what is measured.
#[derive(Clone, Debug, Default)]
pub(super) struct CostModel {
    step: Vec<StageCost>,
    draft: Vec<StageCost>,
    bytes_per_second: f64,
    /// Infinite where multiplying is no limit.
    macs_per_second: f64,
    /// Between two stages.
    crossing: f64,
    /// Of a pass that is launched by itself.
    launch: f64,
    /// Rows that one run of the stages has.
    pass_rows: usize,
    /// Rows of a block.
    block: usize,
    /// Seconds of passes of few rows, which are asked for again and again.
    table: Vec<[f64; 4]>,
}

/// Rows of [`CostModel::table`].
const TABLE: usize = 128;

impl CostModel {
    /// Of a plan: `pass_rows` and `memory_rate` as the engine has them.
    pub fn new(plan: &Plan, pass_rows: Option<usize>, memory_rate: Option<f64>) -> CostModel {
        let workers = plan.target.workers.max(1) as f64;
        let draft = plan.draft.as_ref().map(|draft| draft.block_pass.costs.clone()).unwrap_or_default();
        let block = plan.draft.as_ref().map_or(0, |draft| draft.block);
        let costs = CostModel { step: plan.costs.clone(), draft, block, ..Default::default() };
        let mut costs = match pass_rows {
            // A GPU streams weights at three quarters of its memory's rate, and multiplies beside that.
            Some(pass_rows) => CostModel {
                bytes_per_second: memory_rate.filter(|rate| *rate > 0.0).unwrap_or(2e12) * 0.75,
                macs_per_second: f64::INFINITY,
                crossing: 2e-6,
                launch: 2e-5,
                pass_rows,
                ..costs
            },
            None => CostModel {
                bytes_per_second: 1e10 * workers.min(8.0),
                macs_per_second: 5e10 * workers,
                crossing: 1e-6,
                launch: 0.0,
                pass_rows: usize::MAX,
                ..costs
            },
        };
        let passes = [Pass::Draft, Pass::Step, Pass::Launch, Pass::Round];
        costs.table = (0..TABLE).map(|rows| passes.map(|pass| costs.count(pass, rows))).collect();
        costs
    }

    /// Seconds of a pass; never zero.
    fn seconds(&self, pass: Pass, rows: usize) -> f64 {
        match self.table.get(rows) {
            Some(row) => row[pass as usize],
            None => self.count(pass, rows),
        }
    }

    fn count(&self, pass: Pass, rows: usize) -> f64 {
        if pass == Pass::Round {
            // Nothing is launched for it.
            let draft = self.count(Pass::Draft, self.block) - self.launch;
            return draft.max(1e-6) + self.count(Pass::Launch, rows);
        }
        let costs = if pass == Pass::Draft { &self.draft } else { &self.step };
        let run = |rows: usize| -> f64 {
            let stage = |cost: &StageCost| {
                let bytes = cost.bytes(rows, 0) as f64 / self.bytes_per_second;
                let macs = cost.macs(rows, 0) as f64 / self.macs_per_second;
                cost.runs as f64 * (bytes.max(macs) + self.crossing)
            };
            costs.iter().map(stage).sum()
        };
        let pass_rows = self.pass_rows.max(1);
        let (whole, rest) = (rows / pass_rows, rows % pass_rows);
        let mut seconds = if pass == Pass::Launch { 0.0 } else { self.launch };
        if whole > 0 {
            seconds += whole as f64 * run(pass_rows);
        }
        if rest > 0 {
            seconds += run(rest);
        }
        seconds.max(1e-6)
    }
}
