//! Objects made by hand: machine code that uses every way of addressing that is supported, and
//! every defect.

use super::*;
use object::write::{Object, Relocation, SectionId, StandardSection, Symbol, SymbolId, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, RelocationFlags, SectionKind, SymbolFlags, SymbolKind,
    SymbolScope,
};

struct Builder {
    object: Object<'static>,
    text: SectionId,
}

impl Builder {
    fn new() -> Builder {
        Builder::of(Architecture::X86_64, Endianness::Little)
    }

    fn of(architecture: Architecture, endianness: Endianness) -> Builder {
        let mut object = Object::new(BinaryFormat::Elf, architecture, endianness);
        let text = object.section_id(StandardSection::Text);
        Builder { object, text }
    }

    fn symbol(&mut self, name: &str, section: SymbolSection, kind: SymbolKind, value: u64) -> SymbolId {
        self.object.add_symbol(Symbol {
            name: name.into(),
            value,
            size: 0,
            kind,
            scope: SymbolScope::Linkage,
            weak: false,
            section,
            flags: SymbolFlags::None,
        })
    }

    fn function(&mut self, name: &str, code: &[u8]) -> (SymbolId, u64) {
        let offset = self.object.append_section_data(self.text, code, 16);
        (self.symbol(name, SymbolSection::Section(self.text), SymbolKind::Text, offset), offset)
    }

    fn data(&mut self, section: &str, kind: SectionKind, bytes: &[u8]) -> (SectionId, SymbolId) {
        let id = self.object.add_section(Vec::new(), section.into(), kind);
        self.object.append_section_data(id, bytes, 64);
        (id, self.symbol(&format!("at {section}"), SymbolSection::Section(id), SymbolKind::Data, 0))
    }

    fn reloc(&mut self, section: SectionId, offset: u64, number: u32, symbol: SymbolId, addend: i64) {
        let flags = RelocationFlags::Elf { r_type: number };
        self.object.add_relocation(section, Relocation { offset, symbol, addend, flags }).unwrap();
    }

    fn write(&self) -> Vec<u8> {
        self.object.write().unwrap()
    }
}

const RET: u8 = 0xc3;

/// `entry` that returns at once.
fn minimal() -> Builder {
    let mut builder = Builder::new();
    builder.function(ENTRY, &[RET]);
    builder
}

fn refuse(bytes: &[u8]) -> String {
    link(bytes, "x86_64").unwrap_err().to_string()
}

/// `pick(n)` reads the n-th of two pointers in a relocated table and follows it; `count()` adds one
/// to a variable found through the table of addresses; `call(n)` is `pick(n) + 1`.
fn rich() -> Builder {
    let mut builder = Builder::new();
    let values: Vec<u8> = [1000u64, 2000].iter().flat_map(|value| value.to_le_bytes()).collect();
    let (_, constants) = builder.data(".rodata.values", SectionKind::ReadOnlyData, &values);
    let (table_section, table) = builder.data(".data.rel.ro.table", SectionKind::Data, &[0; 16]);
    builder.reloc(table_section, 0, elf::R_X86_64_64, constants, 8);
    builder.reloc(table_section, 8, elf::R_X86_64_64, constants, 0);
    let bss = builder.object.section_id(StandardSection::UninitializedData);
    builder.object.append_section_bss(bss, 8, 8);
    let variable = builder.symbol("variable", SymbolSection::Section(bss), SymbolKind::Data, 0);

    // lea rax, [rip + table]; mov rax, [rax + 8 * rdi]; mov rax, [rax]; ret
    let code = [0x48, 0x8d, 0x05, 0, 0, 0, 0, 0x48, 0x8b, 0x04, 0xf8, 0x48, 0x8b, 0x00, RET];
    let (pick, offset) = builder.function("pick", &code);
    builder.reloc(builder.text, offset + 3, elf::R_X86_64_PC32, table, -4);
    // mov rax, [rip + slot of variable]; inc qword [rax]; mov rax, [rax]; ret
    let code = [0x48, 0x8b, 0x05, 0, 0, 0, 0, 0x48, 0xff, 0x00, 0x48, 0x8b, 0x00, RET];
    let (_, offset) = builder.function("count", &code);
    builder.reloc(builder.text, offset + 3, elf::R_X86_64_REX_GOTPCRELX, variable, -4);
    // call pick; add rax, 1; ret
    let (_, offset) = builder.function("call", &[0xe8, 0, 0, 0, 0, 0x48, 0x83, 0xc0, 1, RET]);
    builder.reloc(builder.text, offset + 1, elf::R_X86_64_PLT32, pick, -4);
    builder.function(ENTRY, &[RET]);
    builder
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn relocated_code_runs() {
    let native = link(&rich().write(), "x86_64").unwrap();
    let call = |name: &str, argument: u64| {
        let function = native.function(name).unwrap();
        // SAFETY: the machine code above takes an integer and returns one.
        unsafe { std::mem::transmute::<NonNull<u8>, extern "C" fn(u64) -> u64>(function)(argument) }
    };
    assert_eq!([call("pick", 0), call("pick", 1)], [2000, 1000]);
    assert_eq!([call("call", 0), call("call", 1)], [2001, 1001]);
    assert_eq!([call("count", 0), call("count", 0)], [1, 2]);
    assert!(native.entry().is_ok());
    assert!(matches!(native.function("nowhere"), Err(LinkError::NoFunction(name)) if name == "nowhere"));
    assert!(native.function("variable").is_err(), "a variable is no function");
}

#[cfg(target_os = "linux")]
#[test]
fn no_page_is_writable_and_executable() {
    let native = link(&rich().write(), "x86_64").unwrap();
    let start = native.image.base.as_ptr() as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut access = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (range, flags) = (fields.next().unwrap(), fields.next().unwrap());
        let (from, to) = range.split_once('-').unwrap();
        let from = usize::from_str_radix(from, 16).unwrap().max(start);
        let to = usize::from_str_radix(to, 16).unwrap().min(start + native.bytes());
        let page = crate::memory::page_size();
        access.extend((from..to).step_by(page).map(|_| &flags[..3]));
    }
    // Code; constants, their table and the table of addresses; variables.
    assert_eq!(access, ["r-x", "r--", "rw-"]);
}

#[test]
fn files_of_another_kind_are_refused() {
    assert!(refuse(b"MZ").contains("does not start as ELF"));
    assert!(refuse(b"\x7fELF\x02").contains("it has 5 bytes"));
    let arm = Builder::of(Architecture::Aarch64, Endianness::Little).write();
    assert!(refuse(&arm).contains("its machine is 183"));
    let big = Builder::of(Architecture::Aarch64, Endianness::Big).write();
    assert!(link(&big, "aarch64").unwrap_err().to_string().contains("data encoding is 2"));
    let narrow = Builder::of(Architecture::I386, Endianness::Little).write();
    assert!(refuse(&narrow).contains("its class is 1"));
    let mut library = minimal().write();
    library[16] = elf::ET_DYN as u8;
    assert!(refuse(&library).contains("its file type is 3"));
    assert!(link(&minimal().write(), "riscv64").is_err());
}

#[test]
fn undefined_symbols_are_named() {
    let mut builder = minimal();
    for name in ["sinf", "expf"] {
        builder.symbol(name, SymbolSection::Undefined, SymbolKind::Text, 0);
    }
    assert_eq!(refuse(&builder.write()), "undefined symbols: expf, sinf");
}

#[test]
fn relocations_that_cannot_be_applied_are_refused_with_their_place() {
    let with = |offset, number, addend| {
        let mut builder = Builder::new();
        let (entry, _) = builder.function(ENTRY, &[RET; 8]);
        builder.reloc(builder.text, offset, number, entry, addend);
        builder.write()
    };
    assert!(refuse(&with(4, elf::R_X86_64_TPOFF32, 0)).contains("offset 0x4: relocation type 23"));
    assert!(refuse(&with(5, elf::R_X86_64_PC32, 0)).contains("offset 0x5: the relocation lies past the end"));
    assert!(refuse(&with(8, elf::R_X86_64_PC32, 0)).contains("past the end"));
    assert!(refuse(&with(u64::MAX, elf::R_X86_64_PC32, 0)).contains("past the end"));
    assert!(refuse(&with(0, elf::R_X86_64_PC32, 1 << 31)).contains("out of range"));
    assert!(link(&with(4, elf::R_X86_64_PC32, 0), "x86_64").is_ok());
}

#[test]
fn sections_that_generated_code_never_has_are_refused() {
    let mut builder = minimal();
    builder.data(".tdata", SectionKind::Tls, &[0; 8]);
    assert!(refuse(&builder.write()).contains(".tdata: thread-local memory"));
    let mut builder = minimal();
    builder.data(".init_array", SectionKind::Elf(elf::SHT_INIT_ARRAY), &[0; 8]);
    let (id, _) = builder.data(".init_array.1", SectionKind::Elf(elf::SHT_INIT_ARRAY), &[0; 8]);
    builder.object.section_mut(id).flags =
        object::SectionFlags::Elf { sh_flags: u64::from(elf::SHF_ALLOC | elf::SHF_WRITE) };
    assert!(refuse(&builder.write()).contains("code that runs on loading"));
    let mut builder = minimal();
    let bss = builder.object.section_id(StandardSection::UninitializedData);
    builder.object.append_section_bss(bss, MAX_IMAGE, 8);
    assert!(refuse(&builder.write()).contains("larger than"));
    let mut builder = minimal();
    let (id, _) = builder.data(".rodata", SectionKind::ReadOnlyData, &[]);
    builder.object.append_section_data(id, &[0; 8], 1 << 20);
    assert!(refuse(&builder.write()).contains(".rodata is aligned to 1048576"));
}

#[test]
fn damaged_files_are_errors_and_never_a_fault() {
    let good = rich().write();
    for len in 0..good.len() {
        // Cutting what is only padding at the end may be no damage.
        let _ = link(&good[..len], "x86_64");
    }
    let mut refused = 0;
    for at in 0..good.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            refused += usize::from(link(&bytes, "x86_64").is_err());
        }
    }
    assert!(refused > good.len() / 4, "{refused} of {} were refused", good.len() * 3);
}

#[test]
fn a_plan_file_is_checked_before_it_is_linked() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = minimal().write();
    let path = folder.path().join("kernel.o");
    std::fs::write(&path, &bytes).unwrap();
    let sha256 = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let file = |sha256| PlanFile { file: "kernel.o".into(), sha256 };
    let target = |arch: &str, features: &[&str]| PlanTarget {
        device: "cpu".into(),
        arch: arch.into(),
        cpu: String::new(),
        features: features.iter().map(|feature| feature.to_string()).collect(),
        workers: 1,
    };
    let here = target(std::env::consts::ARCH, &[]);
    let load = |file: &PlanFile, target: &PlanTarget| NativeCode::load(folder.path(), file, target);

    let error = load(&file(sha256(b"other")), &here).unwrap_err();
    assert!(matches!(error, NativeError::Checksum { .. }), "{error}");
    let error = load(&file(sha256(&bytes)), &target("sparc", &[])).unwrap_err().to_string();
    assert!(error.contains("compiled for sparc") && error.contains("--arch host"), "{error}");
    let missing = PlanFile { file: "none.o".into(), sha256: String::new() };
    assert!(load(&missing, &here).unwrap_err().to_string().contains("none.o"));
    if cfg!(target_arch = "x86_64") {
        load(&file(sha256(&bytes)), &here).unwrap();
        let error = load(&file(sha256(&bytes)), &target("x86_64", &["+avx999"])).unwrap_err().to_string();
        assert!(error.contains("a processor with avx999; this one has not"), "{error}");
        std::fs::write(&path, Builder::new().write()).unwrap();
        let error = load(&file(sha256(&Builder::new().write())), &here).unwrap_err().to_string();
        assert!(error.contains("kernel.o"), "{error}");
    }
}
