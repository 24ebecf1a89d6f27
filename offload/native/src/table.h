// The table of a unit's kernels. Included at the end of every instruction set's translation unit (isa_*.cpp).

constexpr Kernels table_of(int32_t isa, const char* name) {
  return {isa,           name,         most_in_registers,
          prepare,       rows,         weigh_rows,
          gate,          combine,      widen,
          narrow,        norm,         attend,
          attend_prompt, open_gate,    convolve,
          delta,         change_state, scan,
          encode,        encode_low};
}
