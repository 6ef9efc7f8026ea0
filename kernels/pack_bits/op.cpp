// Packing of codes into bytes on the CPU; see reference.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace qexp {
namespace {

using at::Tensor;

// Eight codes fill `bits` whole bytes, so groups of eight are independent.
Tensor pack(const Tensor& codes, int64_t bits) {
  const Tensor flat = codes.to(at::kInt).contiguous();
  const int64_t count = flat.numel(), bytes = (count * bits + 7) / 8;
  Tensor out = at::empty({bytes}, codes.options().dtype(at::kByte).memory_format(std::nullopt));
  const int32_t* from = flat.const_data_ptr<int32_t>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const uint32_t mask = (1u << bits) - 1;
  at::parallel_for(0, (count + 7) / 8, 4096, [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
      uint64_t stream = 0;
      int held = 0;
      uint8_t* byte = to + group * bits;
      for (int64_t i = group * 8; i < std::min(count, group * 8 + 8); ++i) {
        stream |= static_cast<uint64_t>(static_cast<uint32_t>(from[i]) & mask) << held;
        for (held += static_cast<int>(bits); held >= 8; held -= 8, stream >>= 8) *byte++ = static_cast<uint8_t>(stream);
      }
      if (held > 0) *byte = static_cast<uint8_t>(stream);
    }
  });
  return out;
}

Tensor unpack(const Tensor& packed, int64_t bits, int64_t count, bool is_signed) {
  TORCH_CHECK_VALUE(count * bits <= packed.numel() * 8, "count: ", count, " codes of ", bits, " bits do not fit packed");
  const Tensor stored = packed.contiguous();
  Tensor out = at::empty({count}, packed.options().dtype(at::kInt));
  const uint8_t* from = stored.const_data_ptr<uint8_t>();
  int32_t* to = out.mutable_data_ptr<int32_t>();
  const int32_t sign = is_signed ? 1 << (bits - 1) : 0;
  at::parallel_for(0, count, 32768, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * bits, end = (begin + bits + 7) / 8;
      uint32_t word = 0;
      for (int64_t byte = begin / 8; byte < end; ++byte) word |= static_cast<uint32_t>(from[byte]) << (8 * (byte - begin / 8));
      const int32_t code = static_cast<int32_t>((word >> (begin % 8)) & ((1u << bits) - 1));
      to[i] = (code ^ sign) - sign;
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("pack_bits", &pack);
  m.impl("unpack_bits", &unpack);
}

}  // namespace
}  // namespace qexp
