//! Objects for processors that the tests may not be able to run: they compile, and need nothing
//! from a library.
#![cfg(feature = "llvm")]

mod common;

use common::*;
use inkwell::context::Context;
use inkwell::module::Linkage;
use tilec_ir::abi::{KvLayout, KvType, QuantRows};
use tilec_ir::format::{Format, PanelLayout};
use tilec_kernels_gen::Target;
use tilec_kernels_gen::attention::Attention;
use tilec_kernels_gen::gemm::{Activations, Gemm};
use tilec_kernels_gen::llvm::{Kernels, machine, optimize};
use tilec_kernels_gen::pieces::{Glu, HeadNorm, KvHalf, KvWrite, Rope};
use tilec_kernels_gen::rows::{Embed, Quantize, RmsNorm, Table};

#[test]
fn objects_need_no_symbols() {
    let k = 96;
    let quant = QuantRows { k, max_rows: 4 };
    let layout =
        KvLayout { kv_type: KvType::F16, layers: 1, kv_heads: 2, qk_dim: 40, v_dim: 24, page_tokens: 32 };
    let targets = [
        Target::parse("aarch64-unknown-linux-gnu", "generic", "").unwrap(),
        Target::parse("aarch64-unknown-linux-gnu", "neoverse-n1", "").unwrap(),
        Target::parse(LINUX, "x86-64", "").unwrap(),
        Target::parse(LINUX, "haswell", "").unwrap(),
        Target::parse(LINUX, "alderlake", "").unwrap(),
        Target::parse(LINUX, "skylake-avx512", "").unwrap(),
        Target::parse(LINUX, "znver4", "").unwrap(),
    ];
    for target in targets {
        let context = Context::create();
        let module = context.create_module("kernels");
        let kernels = Kernels::new(&context, &module, &target);
        let mut functions = Vec::new();
        for (name, format) in Format::NAMED {
            let panels = PanelLayout::new(*format, k);
            let float = Gemm { layout: panels, activations: Activations::F32 { stride: k } };
            functions.push(kernels.gemm(&format!("float_{name}"), &float).unwrap());
            if format.integer_codes() {
                let int8 = Gemm { layout: panels, activations: Activations::Int8(quant) };
                functions.push(kernels.gemm(&format!("int8_{name}"), &int8).unwrap());
            }
            let embed = Embed { table: Table::Panels(panels), dim: k, scale: None };
            functions.push(kernels.embed(&format!("embed_{name}"), &embed).unwrap());
        }
        let norm = RmsNorm { dim: k, eps: 1e-5, f32_out: true, quant_out: Some(quant), gathered: true };
        functions.push(kernels.rms_norm("rms_norm", &norm).unwrap());
        functions.push(kernels.quantize("quantize", &Quantize { quant }));
        functions.push(kernels.gather_quant("gather_quant", &quant, &quant).unwrap());
        functions.push(kernels.gather_rows("gather_rows"));
        functions.push(kernels.copy_rows("copy_rows"));
        functions.push(kernels.add_rows("add_rows"));
        functions.push(kernels.add_weighted("add_weighted"));
        functions.push(kernels.bias("bias"));
        functions.push(kernels.head_norm("head_norm", &HeadNorm { head_dim: 64, eps: 1e-6 }).unwrap());
        functions.push(kernels.rope("rope", &Rope { head_dim: 64, rotary_dims: 20 }).unwrap());
        for half in [KvHalf::Key, KvHalf::Value] {
            functions.push(kernels.kv_write(&format!("{half:?}"), &KvWrite { layout, half }).unwrap());
        }
        functions.push(kernels.glu("glu", &Glu::Clamped { alpha: 1.702, limit: 7.0 }));
        let attention = Attention {
            layout,
            group: 3,
            scale: 0.1,
            softcap: Some(30.0),
            window: Some(9),
            sinks: true,
            bidirectional: true,
        };
        functions.push(kernels.attention("attention", &attention).unwrap());
        functions.iter().for_each(|f| f.set_linkage(Linkage::External));
        let machine = machine(&target).unwrap();
        optimize(&module, &machine).unwrap();
        let object = machine.write_to_memory_buffer(&module, inkwell::targets::FileType::Object).unwrap();
        let (triple, cpu) = (&target.triple, &target.cpu);
        assert_eq!(undefined_symbols(object.as_slice()), Vec::<String>::new(), "{triple} {cpu}");
    }
}
