//! Loads the native code of a plan: a relocatable ELF object, mapped and relocated without a linker.
//!
//! The object is self-contained (no undefined symbols), so that loading is three steps: lay the
//! allocated sections out in three runs of pages (code, constants, variables), write the addresses
//! that the relocations ask for, then take away the right to write from code and constants. Memory
//! is never writable and executable at the same time.

mod features;
mod reloc;

use object::LittleEndian as Le;
use object::elf::{self, FileHeader64, Sym64};
use object::read::SectionIndex;
use object::read::elf::{FileHeader, SectionHeader, SectionTable, SymbolTable};
use reloc::{Reloc, RelocError};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use tilec_ir::abi::{ENTRY, StepArgs};
use tilec_ir::plan::{PlanFile, PlanTarget};

/// Type of the entry point ([`tilec_ir::abi::ENTRY`]).
pub type Entry = unsafe extern "C" fn(args: *const StepArgs, worker: u32);

/// More than any plan's code and tables; keeps a damaged size from exhausting memory.
const MAX_IMAGE: u64 = 1 << 30;

/// Why native code cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not the one that the plan was written with.
    #[error(
        "{path}: the code's SHA-256 is {found}, the plan says {expected}; compile the model again with `tilec compile`"
    )]
    Checksum {
        /// The file.
        path: PathBuf,
        /// What the plan says.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// The plan is for another architecture.
    #[error("the plan is compiled for {wanted}, this machine is {here}: compile again with `--arch host`")]
    Architecture {
        /// The plan's.
        wanted: String,
        /// This machine's.
        here: &'static str,
    },
    /// The processor lacks a feature that the code uses.
    #[error(
        "the plan is compiled for a processor with {feature}; this one has not: compile again with `--arch host`"
    )]
    Feature {
        /// LLVM's name.
        feature: String,
    },
    /// The object cannot be linked.
    #[error("{path}: {source}; compile the model again with `tilec compile`")]
    Link {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: LinkError,
    },
}

/// What is wrong with an object file.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Not a relocatable ELF object of this machine.
    #[error("not a relocatable 64-bit little-endian ELF object for {arch}: {what}")]
    Kind {
        /// The architecture that was asked for.
        arch: String,
        /// What it is instead.
        what: String,
    },
    /// The file contradicts itself.
    #[error("damaged ELF object: {0}")]
    Damaged(String),
    /// Names that the object leaves to others.
    #[error("undefined symbols: {}", .0.join(", "))]
    Undefined(Vec<String>),
    /// Something that generated code never has.
    #[error("section {section}: {what} is not supported")]
    Unsupported {
        /// The section.
        section: String,
        /// What.
        what: &'static str,
    },
    /// A relocation that is not understood.
    #[error("section {section}, offset {offset:#x}: relocation type {number} is not supported")]
    UnknownRelocation {
        /// The section that it changes.
        section: String,
        /// Where.
        offset: u64,
        /// The ELF number.
        number: u32,
    },
    /// A relocation that cannot be applied.
    #[error("section {section}, offset {offset:#x}: the relocation {source}")]
    Relocation {
        /// The section that it changes.
        section: String,
        /// Where.
        offset: u64,
        /// Why not.
        source: RelocError,
    },
    /// A function that is not there.
    #[error("there is no function `{0}`")]
    NoFunction(String),
    /// The system refused memory, or to make it executable.
    #[error("cannot {doing} {bytes} bytes for native code: {source}")]
    Memory {
        /// What was asked for.
        doing: &'static str,
        /// How much.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
}

impl From<object::Error> for LinkError {
    fn from(error: object::Error) -> Self {
        LinkError::Damaged(error.to_string())
    }
}

/// Native code in memory.
#[derive(Debug)]
pub struct NativeCode {
    image: Image,
    /// Offset in the image of every defined function.
    functions: HashMap<String, usize>,
}

impl NativeCode {
    /// Loads the code of a plan in `folder` after checking its sum and that this processor can run
    /// it.
    ///
    /// # Errors
    /// [`NativeError`], also if there is no entry point; nothing stays mapped then.
    pub fn load(folder: &Path, code: &PlanFile, target: &PlanTarget) -> Result<NativeCode, NativeError> {
        if target.arch != std::env::consts::ARCH {
            return Err(NativeError::Architecture {
                wanted: target.arch.clone(),
                here: std::env::consts::ARCH,
            });
        }
        if let Some(feature) = features::first_missing(&target.features) {
            return Err(NativeError::Feature { feature: feature.into() });
        }
        let path = folder.join(&code.file);
        let bytes = std::fs::read(&path).map_err(|source| NativeError::Io { path: path.clone(), source })?;
        let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        if !found.eq_ignore_ascii_case(&code.sha256) {
            return Err(NativeError::Checksum { path, expected: code.sha256.clone(), found });
        }
        let checked = link(&bytes, &target.arch).and_then(|native| native.entry().map(|_| native));
        checked.map_err(|source| NativeError::Link { path, source })
    }

    /// The address of a function.
    ///
    /// # Errors
    /// [`LinkError::NoFunction`].
    pub fn function(&self, name: &str) -> Result<NonNull<u8>, LinkError> {
        let offset = self.functions.get(name).ok_or_else(|| LinkError::NoFunction(name.into()))?;
        // SAFETY: `link` keeps only offsets of functions inside of the image.
        Ok(unsafe { self.image.base.add(*offset) })
    }

    /// The entry point of a step.
    ///
    /// # Errors
    /// [`LinkError::NoFunction`].
    pub fn entry(&self) -> Result<Entry, LinkError> {
        let address = self.function(ENTRY)?;
        // SAFETY: the plan's interface version says that a function of this name has this type. What
        // it does when called is the caller's concern.
        Ok(unsafe { std::mem::transmute::<NonNull<u8>, Entry>(address) })
    }

    /// Bytes that the image occupies.
    pub fn bytes(&self) -> usize {
        self.image.len
    }
}

/// Pages that stay until dropped.
#[derive(Debug)]
struct Image {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the pages are owned, and not written to after `link`.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

impl Image {
    fn new(len: usize) -> Result<Image, LinkError> {
        // SAFETY: an anonymous mapping at an address of the system's choice touches nothing else.
        let base = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => Ok(Image { base, len }),
            _ => Err(LinkError::Memory { doing: "map", bytes: len, source: std::io::Error::last_os_error() }),
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `len` bytes, readable and writable until `protect`, and borrowed
        // from its only owner.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    fn protect(&mut self, range: std::ops::Range<usize>, access: i32) -> Result<(), LinkError> {
        if range.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is whole pages of this mapping; nothing borrows from it.
        let status =
            unsafe { libc::mprotect(self.base.add(range.start).as_ptr().cast(), range.len(), access) };
        match status {
            0 => Ok(()),
            _ => Err(LinkError::Memory {
                doing: "protect",
                bytes: range.len(),
                source: std::io::Error::last_os_error(),
            }),
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's own and nothing can refer to it any more. A failure
        // would leak pages, which is no reason to stop.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The runs of pages, in the order that they are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    Code,
    Constants,
    Variables,
}

/// A section that gets memory.
struct Placed {
    run: Run,
    /// Offset in the image.
    offset: usize,
    size: usize,
}

/// One change to make, with everything but addresses.
struct Fixup {
    section: SectionIndex,
    offset: u64,
    reloc: Reloc,
    symbol: object::SymbolIndex,
    addend: i64,
}

/// Links one object into memory.
fn link(file: &[u8], arch: &str) -> Result<NativeCode, LinkError> {
    let machine = check_kind(file, arch)?;
    let header = FileHeader64::<Le>::parse(file)?;
    let sections = header.sections(Le, file)?;
    let symbols = sections.symbols(Le, file, elf::SHT_SYMTAB)?;
    let object = Object { file, sections, symbols };
    object.refuse_undefined()?;

    let fixups = object.fixups(machine)?;
    // The table of addresses that some relocations go through: a slot per symbol.
    let mut slots: HashMap<object::SymbolIndex, usize> = HashMap::new();
    for fixup in fixups.iter().filter(|fixup| fixup.reloc.through_table) {
        let next = slots.len();
        slots.entry(fixup.symbol).or_insert(next);
    }
    let layout = object.layout(slots.len())?;

    let mut image = Image::new(layout.len)?;
    let base = image.base.as_ptr() as u64;
    for (index, placed) in &layout.placed {
        let data = object.sections.section(*index)?.data(Le, file)?;
        // A section without bits in the file has no data, and its memory is zero already.
        image.bytes()[placed.offset..][..data.len()].copy_from_slice(data);
    }
    for (symbol, slot) in &slots {
        let address = base.wrapping_add(object.value(*symbol, &layout)?);
        image.bytes()[layout.table + slot * 8..][..8].copy_from_slice(&address.to_le_bytes());
    }
    for fixup in &fixups {
        let placed = &layout.placed[&fixup.section];
        let fail = |source| LinkError::Relocation {
            section: object.section_name(fixup.section),
            offset: fixup.offset,
            source,
        };
        let offset = usize::try_from(fixup.offset).ok().filter(|offset| *offset < placed.size);
        let offset = offset.ok_or_else(|| fail(RelocError::PastEnd))?;
        let symbol = match slots.get(&fixup.symbol) {
            Some(slot) if fixup.reloc.through_table => (layout.table + slot * 8) as u64,
            _ => object.value(fixup.symbol, &layout)?,
        };
        let place = placed.offset + offset;
        let bytes = &mut image.bytes()[place..placed.offset + placed.size];
        let symbol = base.wrapping_add(symbol);
        fixup.reloc.apply(bytes, symbol, fixup.addend, base + place as u64).map_err(fail)?;
    }
    let functions = object.functions(&layout)?;
    // Turning the pages executable is also what makes the system flush instruction caches on
    // machines where they do not follow writes.
    image.protect(0..layout.code_end, libc::PROT_READ | libc::PROT_EXEC)?;
    image.protect(layout.code_end..layout.constants_end, libc::PROT_READ)?;
    Ok(NativeCode { image, functions })
}

/// Checks what the first bytes say, in words that help, and returns the machine.
fn check_kind(file: &[u8], arch: &str) -> Result<u16, LinkError> {
    let kind = |what: String| LinkError::Kind { arch: arch.into(), what };
    let machine = match arch {
        "x86_64" => elf::EM_X86_64,
        "aarch64" => elf::EM_AARCH64,
        _ => return Err(kind("no native code for this architecture can be loaded".into())),
    };
    if !file.starts_with(&elf::ELFMAG) {
        return Err(kind("it does not start as ELF files do".into()));
    }
    let Some(head) = file.get(..20) else { return Err(kind(format!("it has {} bytes", file.len()))) };
    if head[4] != elf::ELFCLASS64 {
        return Err(kind(format!("its class is {}", head[4])));
    }
    if head[5] != elf::ELFDATA2LSB {
        return Err(kind(format!("its data encoding is {}", head[5])));
    }
    let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    if half(16) != elf::ET_REL {
        return Err(kind(format!("its file type is {}", half(16))));
    }
    if half(18) != machine {
        return Err(kind(format!("its machine is {}", half(18))));
    }
    Ok(machine)
}

/// A parsed object file.
struct Object<'f> {
    file: &'f [u8],
    sections: SectionTable<'f, FileHeader64<Le>>,
    symbols: SymbolTable<'f, FileHeader64<Le>>,
}

/// Where everything goes.
struct Layout {
    placed: HashMap<SectionIndex, Placed>,
    /// Offset of the table of addresses.
    table: usize,
    code_end: usize,
    constants_end: usize,
    len: usize,
}

impl Object<'_> {
    fn section_name(&self, index: SectionIndex) -> String {
        let section = self.sections.section(index);
        let name = section.and_then(|section| self.sections.section_name(Le, section));
        name.map_or_else(|_| format!("{}", index.0), |name| String::from_utf8_lossy(name).into_owned())
    }

    fn symbol_name(&self, symbol: &Sym64<Le>) -> String {
        let name = self.symbols.symbol_name(Le, symbol);
        name.map_or_else(|error| error.to_string(), |name| String::from_utf8_lossy(name).into_owned())
    }

    fn refuse_undefined(&self) -> Result<(), LinkError> {
        let undefined = |symbol: &&Sym64<Le>| {
            matches!(symbol.st_shndx.get(Le), elf::SHN_UNDEF | elf::SHN_COMMON) && symbol.st_name.get(Le) != 0
        };
        let mut names: Vec<String> =
            self.symbols.iter().filter(undefined).map(|symbol| self.symbol_name(symbol)).collect();
        names.sort();
        if names.is_empty() { Ok(()) } else { Err(LinkError::Undefined(names)) }
    }

    fn run(&self, index: SectionIndex) -> Result<Option<Run>, LinkError> {
        // The first section header is a placeholder by definition.
        if index.0 == 0 {
            return Ok(None);
        }
        let section = self.sections.section(index)?;
        let flags = section.sh_flags.get(Le);
        let has = |flag: u32| flags & u64::from(flag) != 0;
        if !has(elf::SHF_ALLOC) {
            return Ok(None);
        }
        let name = self.section_name(index);
        let unsupported = |what| LinkError::Unsupported { section: name.clone(), what };
        if has(elf::SHF_TLS) {
            return Err(unsupported("thread-local memory"));
        }
        if matches!(
            section.sh_type.get(Le),
            elf::SHT_INIT_ARRAY | elf::SHT_FINI_ARRAY | elf::SHT_PREINIT_ARRAY
        ) {
            return Err(unsupported("code that runs on loading"));
        }
        Ok(Some(match (has(elf::SHF_EXECINSTR), has(elf::SHF_WRITE)) {
            (true, true) => return Err(unsupported("code that is writable")),
            (true, false) => Run::Code,
            // Writable for the linker alone.
            (false, true) if !name.starts_with(".data.rel.ro") => Run::Variables,
            _ => Run::Constants,
        }))
    }

    fn fixups(&self, machine: u16) -> Result<Vec<Fixup>, LinkError> {
        let mut fixups = Vec::new();
        for (index, section) in self.sections.enumerate() {
            let (rela, rel) = match section.sh_type.get(Le) {
                elf::SHT_RELA => (section.rela(Le, self.file)?, false),
                elf::SHT_REL => (None, true),
                _ => continue,
            };
            let target = SectionIndex(section.sh_info.get(Le) as usize);
            // Debug information is relocated too, but not loaded.
            if self.run(target)?.is_none() {
                continue;
            }
            let Some((relocations, _)) = rela.filter(|_| !rel) else {
                let section = self.section_name(index);
                return Err(LinkError::Unsupported { section, what: "relocations without addends" });
            };
            for relocation in relocations {
                let number = relocation.r_type(Le, false);
                // Type 0 is nothing on every machine.
                if number == 0 {
                    continue;
                }
                let offset = relocation.r_offset.get(Le);
                let reloc = Reloc::new(machine, number).ok_or_else(|| LinkError::UnknownRelocation {
                    section: self.section_name(target),
                    offset,
                    number,
                })?;
                fixups.push(Fixup {
                    section: target,
                    offset,
                    reloc,
                    symbol: object::SymbolIndex(relocation.r_sym(Le, false) as usize),
                    addend: relocation.r_addend.get(Le),
                });
            }
        }
        Ok(fixups)
    }

    fn layout(&self, slots: usize) -> Result<Layout, LinkError> {
        let page = crate::memory::page_size();
        let mut placed = HashMap::new();
        let mut end = 0u64;
        let too_large = || LinkError::Damaged(format!("its sections are larger than {MAX_IMAGE} bytes"));
        let (mut table, mut ends) = (0, [0usize; 3]);
        for (number, run) in [Run::Code, Run::Constants, Run::Variables].into_iter().enumerate() {
            for (index, section) in self.sections.enumerate() {
                if self.run(index)? != Some(run) {
                    continue;
                }
                let align = section.sh_addralign.get(Le).max(1);
                if !align.is_power_of_two() || align > page as u64 {
                    let name = self.section_name(index);
                    return Err(LinkError::Damaged(format!("section {name} is aligned to {align}")));
                }
                let offset = end.next_multiple_of(align);
                let size = section.sh_size.get(Le);
                end = offset.checked_add(size).filter(|end| *end <= MAX_IMAGE).ok_or_else(too_large)?;
                placed.insert(index, Placed { run, offset: offset as usize, size: size as usize });
            }
            if run == Run::Constants {
                table = end.next_multiple_of(8) as usize;
                end = (table as u64).saturating_add(slots as u64 * 8);
                if end > MAX_IMAGE {
                    return Err(too_large());
                }
            }
            end = end.next_multiple_of(page as u64);
            ends[number] = end as usize;
        }
        if end == 0 {
            return Err(LinkError::Damaged("it has no code".into()));
        }
        Ok(Layout { placed, table, code_end: ends[0], constants_end: ends[1], len: ends[2] })
    }

    /// Offset of a symbol in the image. An absolute symbol would need no image, and is not used.
    fn value(&self, index: object::SymbolIndex, layout: &Layout) -> Result<u64, LinkError> {
        let symbol = self.symbols.symbol(index)?;
        let damaged =
            |what: &str| LinkError::Damaged(format!("symbol {:?} {what}", self.symbol_name(symbol)));
        if symbol.st_type() == elf::STT_GNU_IFUNC || symbol.st_type() == elf::STT_TLS {
            return Err(damaged("is chosen or allocated at run time, which is not supported"));
        }
        let section = self.symbols.symbol_section(Le, symbol, index)?;
        let placed = section.and_then(|section| layout.placed.get(&section));
        let placed = placed.ok_or_else(|| damaged("is in no section that is loaded"))?;
        let value = symbol.st_value.get(Le);
        if value > placed.size as u64 {
            return Err(damaged("lies past the end of its section"));
        }
        Ok(placed.offset as u64 + value)
    }

    fn functions(&self, layout: &Layout) -> Result<HashMap<String, usize>, LinkError> {
        let mut functions = HashMap::new();
        for (index, symbol) in self.symbols.enumerate() {
            if symbol.st_type() != elf::STT_FUNC {
                continue;
            }
            let section = self.symbols.symbol_section(Le, symbol, index)?;
            let placed = section.and_then(|section| layout.placed.get(&section));
            let Some(placed) = placed.filter(|placed| placed.run == Run::Code) else { continue };
            let offset = self.value(index, layout)? as usize;
            if offset < placed.offset + placed.size {
                functions.insert(self.symbol_name(symbol), offset);
            }
        }
        Ok(functions)
    }
}

#[cfg(test)]
#[path = "native/tests.rs"]
mod tests;
