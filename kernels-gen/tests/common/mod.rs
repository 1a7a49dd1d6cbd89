//! What the kernel tests share: a JIT, targets, a packer, scalar references.
#![allow(dead_code, missing_docs)]

use inkwell::OptimizationLevel;
use inkwell::context::Context;
use inkwell::module::Linkage;
use inkwell::values::FunctionValue;
use tilec_ir::abi::QuantRows;
use tilec_ir::format::{Code, Format, PANEL, PanelLayout, ScaleType};
use tilec_kernels_gen::llvm::{Kernels, covers, host_target, machine, optimize};
use tilec_kernels_gen::{KernelError, Target};

pub const LINUX: &str = "x86_64-unknown-linux-gnu";

/// The host, and weaker processors that it can run, each with its name.
pub fn targets() -> Vec<(&'static str, Target)> {
    let host = host_target().unwrap();
    let mut targets = vec![("host", host.clone())];
    if host.triple.starts_with("x86_64") {
        for cpu in ["skylake-avx512", "haswell", "x86-64"] {
            let target = Target::parse(LINUX, cpu, "").unwrap();
            if covers(&host.isa, &target.isa) {
                targets.push((cpu, target));
            }
        }
        let vnni = Target::parse(LINUX, "haswell", "+avxvnni").unwrap();
        if host.features.contains("+avxvnni") {
            targets.push(("avxvnni", vnni));
        }
    }
    targets
}

/// Compiles one kernel for `target`, checks that its object needs no symbols, and hands its
/// address to `run`.
pub fn with_kernel<R>(
    target: &Target,
    build: impl for<'a, 'ctx> Fn(&Kernels<'a, 'ctx>) -> Result<FunctionValue<'ctx>, KernelError>,
    run: impl FnOnce(usize) -> R,
) -> R {
    let context = Context::create();
    let module = context.create_module("kernels");
    let function = build(&Kernels::new(&context, &module, target)).unwrap();
    function.set_linkage(Linkage::External);
    let name = function.get_name().to_str().unwrap().to_owned();
    let machine = machine(target).unwrap();
    optimize(&module, &machine).unwrap();
    let object = machine
        .write_to_memory_buffer(&module, inkwell::targets::FileType::Object)
        .expect("LLVM emits an object");
    assert_eq!(undefined_symbols(object.as_slice()), Vec::<String>::new(), "{name} for {}", target.cpu);
    let engine = module.create_jit_execution_engine(OptimizationLevel::Aggressive).unwrap();
    run(engine.get_function_address(&name).unwrap())
}

pub fn undefined_symbols(object: &[u8]) -> Vec<String> {
    use object::{Object, ObjectSymbol};
    let file = object::File::parse(object).unwrap();
    file.symbols()
        .filter(|s| s.is_undefined() && !s.name().unwrap_or_default().is_empty())
        .map(|s| s.name().unwrap().to_owned())
        .collect()
}

/// Calls a kernel: every argument is a pointer or an i64.
#[macro_export]
macro_rules! call {
    ($address:expr $(, $arg:expr)* $(,)?) => {{
        type Kernel = unsafe extern "C" fn($(call!(@word $arg)),*);
        let address: usize = $address;
        let mut words = [$($crate::common::word($arg)),*].into_iter();
        // SAFETY: the kernel takes as many 64-bit arguments as are passed, and the test made the
        // memory behind the pointers large enough.
        unsafe { std::mem::transmute::<usize, Kernel>(address)($(call!(@next words $arg)),*) }
    }};
    (@word $arg:expr) => { usize };
    (@next $words:ident $arg:expr) => { $words.next().unwrap_or_default() };
}

/// An argument as a machine word.
pub trait Word {
    fn word(self) -> usize;
}
impl Word for usize {
    fn word(self) -> usize {
        self
    }
}
impl<T> Word for *const T {
    fn word(self) -> usize {
        self as usize
    }
}
impl<T> Word for *mut T {
    fn word(self) -> usize {
        self as usize
    }
}
pub fn word(value: impl Word) -> usize {
    value.word()
}

/// Bytes aligned to 64, filled with a pattern that reads as NaN where nothing is written.
pub struct Bytes {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl Bytes {
    pub fn new(len: usize) -> Bytes {
        Bytes { lines: vec![Line([0xff; 64]); len.div_ceil(64)], len }
    }
    pub fn as_ptr(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.lines.as_mut_ptr().cast()
    }
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the lines hold at least `len` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }
    pub fn f32_at(&self, offset: usize) -> f32 {
        f32::from_le_bytes(self.bytes()[offset..offset + 4].try_into().unwrap())
    }
    pub fn i32_at(&self, offset: usize) -> i32 {
        i32::from_le_bytes(self.bytes()[offset..offset + 4].try_into().unwrap())
    }
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        self.bytes_mut()[offset..offset + data.len()].copy_from_slice(data);
    }
}

/// A small generator of test data (xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }
    /// In -1..1.
    pub fn unit(&mut self) -> f32 {
        self.bits() as i32 as f32 / 2147483648.0
    }
    pub fn units(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

pub fn e4m3(byte: u8) -> f32 {
    let (e, m) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let value = match (e, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => m / 8.0 * 2f32.powi(-6),
        _ => (1.0 + m / 8.0) * 2f32.powi(e - 7),
    };
    if byte >> 7 == 1 { -value } else { value }
}

pub fn e2m1(code: u8) -> f32 {
    let value = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
    if code & 8 != 0 { -value } else { value }
}

/// Random weights packed in panels, and what they mean.
pub struct Weights {
    pub layout: PanelLayout,
    pub features: usize,
    pub packed: Bytes,
    /// Stored code per feature and column: the bits.
    codes: Vec<u32>,
    scales: Vec<f32>,
    mins: Vec<f32>,
}

impl Weights {
    pub fn random(format: Format, features: usize, k: usize, random: &mut Random) -> Weights {
        let layout = PanelLayout::new(format, k);
        let format = layout.format;
        let panels = features.div_ceil(PANEL);
        let mut packed = Bytes::new(panels * layout.bytes());
        // What padding means zero: no byte is left as the pattern of `Bytes`.
        let (block, blocks) = (format.block.max(1), layout.blocks());
        let mut scales = vec![0.0; panels * PANEL * blocks];
        let mut mins = scales.clone();
        let mut codes = vec![0; panels * PANEL * layout.k_pad()];
        for feature in 0..panels * PANEL {
            let base = feature / PANEL * layout.bytes();
            let lane = feature % PANEL;
            for b in 0..blocks {
                let real = feature < features && b * block < k;
                let ty = format.scale.unwrap();
                let at = base + (b * PANEL + lane) * ty.bytes();
                scales[feature * blocks + b] = put_scale(&mut packed, at, ty, real, false, random);
                if format.min {
                    let at = at + layout.min_offset();
                    mins[feature * blocks + b] = put_scale(&mut packed, at, ty, real, true, random);
                }
            }
            for column in 0..layout.k_pad() {
                let real = feature < features && column < k;
                let code = if real { random_code(format.code, random) } else { format.zero as u32 };
                codes[feature * layout.k_pad() + column] = code;
                let (at, high) = layout.code_at(lane, column);
                let bytes = code.to_le_bytes();
                match format.code.bits() {
                    4 => {
                        let byte = &mut packed.bytes_mut()[base + at];
                        *byte = if high { *byte & 0x0f | bytes[0] << 4 } else { *byte & 0xf0 | bytes[0] };
                    }
                    bits => packed.put(base + at, &bytes[..bits / 8]),
                }
            }
        }
        Weights { layout, features, packed, codes, scales, mins }
    }

    fn code(&self, feature: usize, column: usize) -> u32 {
        self.codes[feature * self.layout.k_pad() + column]
    }

    pub fn value(&self, feature: usize, column: usize) -> f64 {
        let format = self.layout.format;
        let code = self.code(feature, column);
        let code = match format.code {
            Code::F32 => f32::from_bits(code),
            Code::F16 => half::f16::from_bits(code as u16).to_f32(),
            Code::Bf16 => half::bf16::from_bits(code as u16).to_f32(),
            Code::E4m3 => e4m3(code as u8),
            Code::E2m1 => e2m1(code as u8),
            Code::I8 | Code::U4 => (code as i32 - format.zero) as f32,
        };
        match format.block {
            0 => f64::from(code),
            block => {
                let at = feature * self.layout.blocks() + column / block;
                f64::from(self.scales[at]) * f64::from(code) + f64::from(self.mins[at])
            }
        }
    }

    /// What the integer kernel must give, bit for bit.
    pub fn int8_dot(&self, feature: usize, x: &Quant, row: usize) -> f32 {
        let (layout, format) = (self.layout, self.layout.format);
        let per_block = 32 / format.block;
        let mut sum = 0f32;
        for block in 0..layout.k_pad() / 32 {
            let x_scale = x.scale(row, block);
            for part in 0..per_block {
                let index = block * per_block + part;
                let at = feature * layout.blocks() + index;
                let mut dot = 0i32;
                for column in index * format.block..(index + 1) * format.block {
                    let code = self.code(feature, column);
                    let weight = match format.code {
                        Code::E2m1 => (2.0 * e2m1(code as u8)) as i32,
                        _ => code as i32 - format.zero,
                    };
                    dot += weight * i32::from(x.code(row, column));
                }
                let halve = if format.code == Code::E2m1 { 0.5 } else { 1.0 };
                sum = (dot as f32).mul_add(self.scales[at] * halve * x_scale, sum);
                if format.min {
                    sum = self.mins[at].mul_add(x_scale * x.sum(row, block) as f32, sum);
                }
            }
        }
        sum
    }
}

fn random_code(code: Code, random: &mut Random) -> u32 {
    let value = random.unit();
    match code {
        Code::F32 => value.to_bits(),
        Code::F16 => u32::from(half::f16::from_f32(value).to_bits()),
        Code::Bf16 => u32::from(half::bf16::from_f32(value).to_bits()),
        // All but the two NaNs.
        Code::E4m3 => [random.bits() & 0xff].map(|c| if c & 0x7f == 0x7f { c - 1 } else { c })[0],
        Code::I8 => random.bits() & 0xff,
        Code::E2m1 | Code::U4 => random.bits() & 0xf,
    }
}

/// Writes a random scale (or 0 for padding), and returns what it means.
fn put_scale(to: &mut Bytes, at: usize, ty: ScaleType, real: bool, signed: bool, random: &mut Random) -> f32 {
    let value = if !real {
        0.0
    } else if signed {
        random.unit() * 0.1
    } else {
        (random.unit().abs() + 0.01) * 0.02
    };
    match ty {
        ScaleType::F32 => {
            to.put(at, &value.to_le_bytes());
            value
        }
        ScaleType::F16 => {
            let value = half::f16::from_f32(value);
            to.put(at, &value.to_le_bytes());
            value.to_f32()
        }
        ScaleType::E8m0 => {
            let byte = if real { 118 + (random.bits() % 5) as u8 } else { 127 };
            to.put(at, &[byte]);
            2f32.powi(i32::from(byte) - 127)
        }
        ScaleType::E4m3 => {
            let byte = if real { (random.bits() % 0x30) as u8 } else { 0 };
            to.put(at, &[byte]);
            e4m3(byte)
        }
    }
}

/// Quantized rows.
pub struct Quant {
    pub layout: QuantRows,
    pub data: Bytes,
}

impl Quant {
    pub fn empty(k: usize, max_rows: usize) -> Quant {
        let layout = QuantRows { k, max_rows };
        Quant { layout, data: Bytes::new(layout.bytes()) }
    }
    pub fn random(k: usize, rows: usize, random: &mut Random) -> Quant {
        let mut quant = Quant::empty(k, rows);
        let layout = quant.layout;
        for row in 0..rows {
            for block in 0..layout.blocks() {
                let mut sum = 0;
                for column in block * 32..block * 32 + 32 {
                    let code = if column < k { (random.bits() % 255) as i32 - 127 } else { 0 };
                    sum += code;
                    quant.data.put(row * layout.k_pad() + column, &[code as i8 as u8]);
                }
                let at = (row * layout.blocks() + block) * 4;
                let scale = random.unit().abs() * 0.03;
                quant.data.put(layout.scale_offset() + at, &scale.to_le_bytes());
                quant.data.put(layout.sum_offset() + at, &i32::to_le_bytes(sum));
            }
        }
        quant
    }
    pub fn code(&self, row: usize, column: usize) -> i8 {
        self.data.bytes()[row * self.layout.k_pad() + column] as i8
    }
    pub fn scale(&self, row: usize, block: usize) -> f32 {
        self.data.f32_at(self.layout.scale_offset() + (row * self.layout.blocks() + block) * 4)
    }
    pub fn sum(&self, row: usize, block: usize) -> i32 {
        self.data.i32_at(self.layout.sum_offset() + (row * self.layout.blocks() + block) * 4)
    }
}

/// Bits of floats, for comparisons that must be exact.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Asserts that `got` is within `tolerance` of `want` (f64), relative to the larger of it and 1.
#[track_caller]
pub fn close(got: f32, want: f64, tolerance: f64, what: impl Fn() -> String) {
    let error = (f64::from(got) - want).abs();
    assert!(error <= tolerance * want.abs().max(1.0), "{}: {got}, should be {want}", what());
}
