//! Relocations: which bits of the code depend on where things are mapped.

use object::elf;

/// What is written at a relocated place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    /// The address, 64 bits.
    Abs64,
    /// The address, 32 bits, zero-extended by its user.
    Abs32,
    /// The address, 32 bits, sign-extended by its user.
    Abs32Signed,
    /// The distance from the place, 32 bits.
    Rel32,
    /// The distance from the place, 64 bits.
    Rel64,
    /// AArch64 `b` and `bl`: the distance in words, 26 bits.
    Branch26,
    /// AArch64 `adrp`: the distance in pages of 4 KiB, 21 bits.
    Page21,
    /// AArch64 `add` and loads and stores: the low 12 bits of the address, in units of 2 to this
    /// power.
    Low12(u32),
}

/// A relocation that is understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reloc {
    field: Field,
    /// Whether the symbol stands for its slot in the table of addresses.
    pub through_table: bool,
}

/// Why a relocation cannot be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelocError {
    /// The place is not whole inside of its section.
    #[error("lies past the end of its section")]
    PastEnd,
    /// The value does not fit into the field.
    #[error("is out of range: the value {0:#x} does not fit")]
    Range(i64),
}

impl Reloc {
    /// The relocation of this number, or `None` if it is not understood.
    pub fn new(machine: u16, number: u32) -> Option<Reloc> {
        let direct = |field| Some(Reloc { field, through_table: false });
        let table = |field| Some(Reloc { field, through_table: true });
        match (machine, number) {
            (elf::EM_X86_64, elf::R_X86_64_64) => direct(Field::Abs64),
            (elf::EM_X86_64, elf::R_X86_64_32) => direct(Field::Abs32),
            (elf::EM_X86_64, elf::R_X86_64_32S) => direct(Field::Abs32Signed),
            // Every symbol is in the object, so a call through the linkage table is a call.
            (elf::EM_X86_64, elf::R_X86_64_PC32 | elf::R_X86_64_PLT32) => direct(Field::Rel32),
            (elf::EM_X86_64, elf::R_X86_64_PC64) => direct(Field::Rel64),
            (
                elf::EM_X86_64,
                elf::R_X86_64_GOTPCREL | elf::R_X86_64_GOTPCRELX | elf::R_X86_64_REX_GOTPCRELX,
            ) => table(Field::Rel32),
            (elf::EM_AARCH64, elf::R_AARCH64_ABS64) => direct(Field::Abs64),
            (elf::EM_AARCH64, elf::R_AARCH64_PREL32) => direct(Field::Rel32),
            (elf::EM_AARCH64, elf::R_AARCH64_PREL64) => direct(Field::Rel64),
            (elf::EM_AARCH64, elf::R_AARCH64_CALL26 | elf::R_AARCH64_JUMP26) => direct(Field::Branch26),
            (elf::EM_AARCH64, elf::R_AARCH64_ADR_PREL_PG_HI21) => direct(Field::Page21),
            (elf::EM_AARCH64, elf::R_AARCH64_ADD_ABS_LO12_NC) => direct(Field::Low12(0)),
            (elf::EM_AARCH64, elf::R_AARCH64_LDST8_ABS_LO12_NC) => direct(Field::Low12(0)),
            (elf::EM_AARCH64, elf::R_AARCH64_LDST16_ABS_LO12_NC) => direct(Field::Low12(1)),
            (elf::EM_AARCH64, elf::R_AARCH64_LDST32_ABS_LO12_NC) => direct(Field::Low12(2)),
            (elf::EM_AARCH64, elf::R_AARCH64_LDST64_ABS_LO12_NC) => direct(Field::Low12(3)),
            (elf::EM_AARCH64, elf::R_AARCH64_LDST128_ABS_LO12_NC) => direct(Field::Low12(4)),
            (elf::EM_AARCH64, elf::R_AARCH64_ADR_GOT_PAGE) => table(Field::Page21),
            (elf::EM_AARCH64, elf::R_AARCH64_LD64_GOT_LO12_NC) => table(Field::Low12(3)),
            _ => None,
        }
    }

    /// Writes the field at the start of `place`, the section's bytes from the relocated place on.
    ///
    /// `symbol` is the address of the symbol, or of its slot in the table; `address` that of the
    /// place.
    pub fn apply(self, place: &mut [u8], symbol: u64, addend: i64, address: u64) -> Result<(), RelocError> {
        let target = symbol.wrapping_add_signed(addend);
        let distance = target.wrapping_sub(address) as i64;
        match self.field {
            Field::Abs64 => put(place, target.to_le_bytes()),
            Field::Abs32 => {
                let value = u32::try_from(target).map_err(|_| RelocError::Range(target as i64))?;
                put(place, value.to_le_bytes())
            }
            Field::Abs32Signed => put(place, narrow(target as i64)?.to_le_bytes()),
            Field::Rel32 => put(place, narrow(distance)?.to_le_bytes()),
            Field::Rel64 => put(place, distance.to_le_bytes()),
            Field::Branch26 => {
                if distance % 4 != 0 || !(-(1 << 27)..1 << 27).contains(&distance) {
                    return Err(RelocError::Range(distance));
                }
                instruction(place, 0x03ff_ffff, (distance >> 2) as u32)
            }
            Field::Page21 => {
                let pages = ((target & !0xfff).wrapping_sub(address & !0xfff) as i64) >> 12;
                if !(-(1 << 20)..1 << 20).contains(&pages) {
                    return Err(RelocError::Range(distance));
                }
                let (low, high) = ((pages & 3) as u32, ((pages >> 2) & 0x7ffff) as u32);
                instruction(place, 3 << 29 | 0x7ffff << 5, low << 29 | high << 5)
            }
            Field::Low12(unit) => {
                let low = (target & 0xfff) as u32;
                if !low.is_multiple_of(1 << unit) {
                    return Err(RelocError::Range(target as i64));
                }
                instruction(place, 0xfff << 10, (low >> unit) << 10)
            }
        }
    }
}

fn narrow(value: i64) -> Result<i32, RelocError> {
    i32::try_from(value).map_err(|_| RelocError::Range(value))
}

fn put<const N: usize>(place: &mut [u8], bytes: [u8; N]) -> Result<(), RelocError> {
    *place.first_chunk_mut().ok_or(RelocError::PastEnd)? = bytes;
    Ok(())
}

/// Replaces the bits of an instruction that `mask` covers.
fn instruction(place: &mut [u8], mask: u32, bits: u32) -> Result<(), RelocError> {
    let word = place.first_chunk_mut().ok_or(RelocError::PastEnd)?;
    *word = (u32::from_le_bytes(*word) & !mask | bits & mask).to_le_bytes();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(machine: u16, number: u32, word: u64, symbol: u64, addend: i64) -> Result<u64, RelocError> {
        let mut place = word.to_le_bytes();
        Reloc::new(machine, number).unwrap().apply(&mut place, symbol, addend, 0x40_1000)?;
        Ok(u64::from_le_bytes(place))
    }

    #[test]
    fn x86_fields() {
        let x86 = |number, symbol, addend| apply(elf::EM_X86_64, number, 0, symbol, addend);
        assert_eq!(x86(elf::R_X86_64_64, 0x1234_5678_9abc, 8), Ok(0x1234_5678_9ac4));
        assert_eq!(x86(elf::R_X86_64_PC32, 0x40_0000, -4), Ok(0xffff_effc));
        assert_eq!(x86(elf::R_X86_64_PC32, 1 << 32, 0), Err(RelocError::Range((1 << 32) - 0x40_1000)));
        assert_eq!(x86(elf::R_X86_64_32S, 1 << 31, 0), Err(RelocError::Range(1 << 31)));
        assert_eq!(x86(elf::R_X86_64_32, 1 << 31, 0), Ok(1 << 31));
    }

    #[test]
    fn aarch64_fields() {
        let arm = |number, word, symbol| apply(elf::EM_AARCH64, number, word, symbol, 0);
        // bl +8, bl -4
        assert_eq!(arm(elf::R_AARCH64_CALL26, 0x9400_0000, 0x40_1008), Ok(0x9400_0002));
        assert_eq!(arm(elf::R_AARCH64_CALL26, 0x9400_0000, 0x40_0ffc), Ok(0x97ff_ffff));
        assert!(arm(elf::R_AARCH64_CALL26, 0x9400_0000, 0x40_1000 + (1 << 27)).is_err());
        // adrp x0, 5 pages on
        assert_eq!(arm(elf::R_AARCH64_ADR_PREL_PG_HI21, 0x9000_0000, 0x40_6123), Ok(0xb000_0020));
        // add x0, x0, #0x123; ldr x0, [x0, #0x128]; an address that is not aligned for it
        assert_eq!(arm(elf::R_AARCH64_ADD_ABS_LO12_NC, 0x9100_0000, 0x40_6123), Ok(0x9104_8c00));
        assert_eq!(arm(elf::R_AARCH64_LDST64_ABS_LO12_NC, 0xf940_0000, 0x40_6128), Ok(0xf940_9400));
        assert!(arm(elf::R_AARCH64_LDST64_ABS_LO12_NC, 0xf940_0000, 0x40_6123).is_err());
    }

    #[test]
    fn a_place_that_is_cut_off_and_unknown_numbers_are_refused() {
        let reloc = Reloc::new(elf::EM_X86_64, elf::R_X86_64_64).unwrap();
        assert_eq!(reloc.apply(&mut [0; 7], 0, 0, 0), Err(RelocError::PastEnd));
        assert_eq!(Reloc::new(elf::EM_X86_64, elf::R_X86_64_TPOFF32), None);
        assert_eq!(Reloc::new(elf::EM_AARCH64, elf::R_X86_64_64), None);
    }
}
