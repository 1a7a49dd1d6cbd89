//! Where packed weights go, while a program is laid out: one behind the other, each thing once.

use std::collections::HashMap;
use tilec_ir::pack::{PackContent, PackItem, Packing};
use tilec_ir::stages::Slot;

/// A packing that grows.
#[derive(Debug)]
pub struct Packer {
    /// What is packed so far.
    pub packing: Packing,
    /// Offsets of what is there already, by description: a tied head is packed once.
    known: HashMap<String, u64>,
    align: u64,
}

impl Packer {
    /// An empty packing whose items start on multiples of `align` bytes.
    pub fn new(align: u64) -> Packer {
        Packer { packing: Packing::default(), known: HashMap::new(), align }
    }

    /// A place in the layer's table, or a fixed one outside the layers.
    pub fn slot(&mut self, content: PackContent, offsets: Option<&mut Vec<u64>>) -> Slot {
        match offsets {
            None => self.fixed(content),
            Some(offsets) => {
                offsets.push(self.pack(content));
                Slot::Layer(offsets.len() - 1)
            }
        }
    }

    /// A place that all layers share.
    pub fn fixed(&mut self, content: PackContent) -> Slot {
        Slot::Fixed(self.pack(content))
    }

    fn pack(&mut self, content: PackContent) -> u64 {
        let key = serde_json::to_string(&content).expect("a packing item is plain data");
        let packing = &mut self.packing;
        *self.known.entry(key).or_insert_with(|| {
            let offset = packing.bytes.next_multiple_of(self.align);
            packing.bytes = offset + content.bytes().expect("a declared weight fits in memory");
            packing.items.push(PackItem { offset, content });
            offset
        })
    }
}
