//! One text for layers that differ only in what a table can say: where their weights lie, how far attention sees,
//! which rotation it has, and whether heads have sinks. A layer's instructions then stay in an SM's cache while kinds
//! of layers alternate.

use tilec_ir::resident::{Kind, ResidentProgram, Stage};
use tilec_ir::stages::Slot;

/// The window of a layer without one: no position is so large.
pub const NO_WINDOW: u32 = 0x7fff_ffff;

/// The offset of what a layer does not have.
pub const NO_OFFSET: u64 = u64::MAX;

/// What a table says of a layer, in place of a [`Slot`] that layers of other kinds do not have in common.
#[derive(Clone, Copy, PartialEq)]
enum Entry {
    Slot(Slot),
    Nothing,
}

/// A kind of layer, told apart by its stages alone.
struct Canonical {
    body: Vec<Stage>,
    /// By the numbers of the body's slots.
    entries: Vec<Entry>,
    window: u32,
}

/// What attention may differ in between kinds of layers that share a text.
#[derive(Clone, Copy)]
struct Freedom {
    ropes: bool,
    sinks: bool,
}

/// The program with as few bodies as its layers need, and the windows of its layers. The program as it is, and no
/// windows, if there is nothing to merge.
pub fn merge_layers(program: &ResidentProgram) -> (ResidentProgram, Vec<u32>) {
    let attention = || program.bodies.iter().flatten().filter_map(|stage| stage.kind.attention());
    let mut ropes = attention().map(|attention| attention.rope);
    let first = ropes.next().flatten();
    let freedom = Freedom {
        ropes: ropes.any(|rope| rope != first),
        sinks: attention().any(|attention| attention.sinks.is_some()),
    };
    let canonical: Vec<Canonical> = program.bodies.iter().map(|body| canonical(body, freedom)).collect();
    let mut kept: Vec<usize> = Vec::new();
    let merged: Vec<usize> = (0..canonical.len())
        .map(|own| {
            let same = kept.iter().position(|other| canonical[*other].body == canonical[own].body);
            same.unwrap_or_else(|| {
                kept.push(own);
                kept.len() - 1
            })
        })
        .collect();
    if kept.len() == canonical.len() {
        return (program.clone(), Vec::new());
    }
    let mut program = program.clone();
    let windows = program.layers.iter().map(|layer| canonical[layer.body].window).collect();
    for layer in &mut program.layers {
        let offset = |entry: &Entry| match entry {
            Entry::Slot(Slot::Fixed(at)) => *at,
            // A verified program has it.
            Entry::Slot(Slot::Layer(n)) => layer.offsets.get(*n).copied().unwrap_or(NO_OFFSET),
            Entry::Nothing => NO_OFFSET,
        };
        layer.offsets = canonical[layer.body].entries.iter().map(offset).collect();
        layer.body = merged[layer.body];
    }
    program.bodies = kept.into_iter().map(|own| canonical[own].body.clone()).collect();
    (program, windows)
}

/// The body with its slots numbered in the order of its stages.
fn canonical(body: &[Stage], freedom: Freedom) -> Canonical {
    let mut canonical = Canonical { body: body.to_vec(), entries: Vec::new(), window: NO_WINDOW };
    let entries = &mut canonical.entries;
    let mut place = |entry: Entry| {
        let known = entries.iter().position(|other| *other == entry && entry != Entry::Nothing);
        Slot::Layer(known.unwrap_or_else(|| {
            entries.push(entry);
            entries.len() - 1
        }))
    };
    for stage in &mut canonical.body {
        // Sinks come last, with the same number whether there are any.
        let sinks = match &mut stage.kind {
            Kind::Attention(attention) => attention.sinks.take(),
            _ => None,
        };
        for slot in stage.kind.slots_mut() {
            if matches!(slot, Slot::Layer(_)) {
                *slot = place(Entry::Slot(*slot));
            }
        }
        let Kind::Attention(attention) = &mut stage.kind else { continue };
        canonical.window = attention.window.take().map_or(NO_WINDOW, |window| window as u32);
        if let Some(rope) = attention.rope.as_mut().filter(|_| freedom.ropes)
            && matches!(rope.table, Slot::Fixed(_))
        {
            rope.table = place(Entry::Slot(rope.table));
        }
        if freedom.sinks {
            attention.sinks = Some(place(sinks.map_or(Entry::Nothing, Entry::Slot)));
        }
    }
    canonical
}
