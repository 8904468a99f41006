// Shapes, types and attributes of the operators, and sentences about those that do not fit.
#include "shims/trt/operator.h"

namespace rankbook::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr std::int64_t kAny = -1;

// Whether dims equal the wanted sizes, kAny matching every size.
bool fits(const Dims& dims, std::initializer_list<std::int64_t> want) {
  if (dims.nbDims != static_cast<std::int32_t>(want.size())) return false;
  std::int32_t i = 0;
  for (const std::int64_t size : want) {
    const std::int64_t have = dims.d[i++];
    if (size != kAny && have != size) return false;
  }
  return true;
}

std::string wrong(Input input, const Dims& dims, const std::string& want) {
  return std::string(Branch::kInputs[input]) + " has shape " + text_of(dims) + "; it must be " + want;
}

std::string shape(std::initializer_list<std::int64_t> sizes) {
  Dims dims{};
  for (const std::int64_t size : sizes) dims.d[dims.nbDims++] = size;
  return text_of(dims);
}

std::string read_params(const Operator& op, const Dims* dims, cuda::PackedWeight* w) {
  const std::int64_t panels = cuda::ceil_div(op.out_features, cuda::kPanel);
  w->params_full = dims[Branch::kParams].nbDims == 4 && dims[Branch::kParams].d[3] == cuda::kPanel;
  w->step_full = dims[Branch::kStep].nbDims == 4 && dims[Branch::kStep].d[3] == cuda::kPanel;
  const Dims& full = w->params_full ? dims[Branch::kParams] : dims[Branch::kStep];
  if (!fits(full, {panels, kAny, kAny, cuda::kPanel})) {
    return wrong(w->params_full ? Branch::kParams : Branch::kStep, full, "(" + std::to_string(panels) + ", G, Q, 32)");
  }
  const std::int64_t groups = full.d[1], planes = full.d[2];
  w->groups = static_cast<std::int32_t>(groups);
  w->params_planes = static_cast<std::int32_t>(planes);
  if (!w->params_full && !fits(dims[Branch::kParams], {1, 1, 1, 1})) {
    return wrong(Branch::kParams, dims[Branch::kParams], shape({panels, groups, planes, 32}) + " or " + shape({1, 1, 1, 1}));
  }
  if (!fits(dims[Branch::kStep], {panels, 1, planes, 1}) && !fits(dims[Branch::kStep], {panels, groups, planes, cuda::kPanel})) {
    return wrong(Branch::kStep, dims[Branch::kStep], shape({panels, 1, planes, 1}) + " or " + shape({panels, groups, planes, 32}));
  }
  w->base_full = fits(dims[Branch::kBase], {panels, 1, planes, 1});
  if (!w->base_full && !fits(dims[Branch::kBase], {1, 1, 1, 1})) {
    return wrong(Branch::kBase, dims[Branch::kBase], shape({panels, 1, planes, 1}) + " or " + shape({1, 1, 1, 1}));
  }
  if (w->planes() < 1 || w->planes() > cuda::kMaxPlanes) {
    return "there are " + std::to_string(w->planes()) + " planes of coefficients; allowed are 1 to 4";
  }
  if (groups < 1 || op.in_features % groups != 0 || (groups > 1 && op.in_features / groups % 16 != 0)) {
    return std::to_string(op.in_features) + " inputs cannot be cut into " + std::to_string(groups) +
           " groups; groups are multiples of 16 inputs, or one is the whole row";
  }
  const std::int64_t levels = std::int64_t{1} << op.bits;
  return fits(dims[Branch::kLevels], {planes, levels}) ? "" : wrong(Branch::kLevels, dims[Branch::kLevels], shape({planes, levels}));
}

std::string read_branch(const Operator& op, const Dims* dims, cuda::Matmul* m) {
  if (dims[Branch::kUpScale].nbDims != 2 || dims[Branch::kUpScale].d[1] < 1) return wrong(Branch::kUpScale, dims[Branch::kUpScale], "(1, R) or (N, R)");
  const std::int64_t rank = dims[Branch::kUpScale].d[1], rows = op.out_features, columns = op.in_features;
  m->rank = static_cast<std::int32_t>(rank);
  m->down.codes_full = fits(dims[Branch::kDown], {rank, columns});
  m->up.codes_full = fits(dims[Branch::kUp], {rows, rank});
  m->down.scale_full = fits(dims[Branch::kDownScale], {rank, columns}) && columns > 1;
  m->up.scale_full = fits(dims[Branch::kUpScale], {rows, rank}) && rows > 1;
  if (!m->down.codes_full && !fits(dims[Branch::kDown], {1, 1})) {
    return wrong(Branch::kDown, dims[Branch::kDown], shape({rank, columns}) + " or (1, 1)");
  }
  if (!m->up.codes_full && !fits(dims[Branch::kUp], {1, 1})) return wrong(Branch::kUp, dims[Branch::kUp], shape({rows, rank}) + " or (1, 1)");
  if (!m->down.scale_full && !fits(dims[Branch::kDownScale], {rank, 1})) {
    return wrong(Branch::kDownScale, dims[Branch::kDownScale], shape({rank, 1}) + " or " + shape({rank, columns}));
  }
  if (!m->up.scale_full && !fits(dims[Branch::kUpScale], {1, rank})) {
    return wrong(Branch::kUpScale, dims[Branch::kUpScale], shape({1, rank}) + " or " + shape({rows, rank}));
  }
  return "";
}

}  // namespace

std::string Operator::name() const {
  const char* name = kind == Kind::kMatmul   ? contract::CodebookMatMul::kName
                     : kind == Kind::kGather ? contract::CodebookGather::kName
                                             : contract::CodebookMatMulLowRank::kName;
  return name + std::to_string(bits) + (int8 ? contract::CodebookMatMulA8::kSuffix : "");
}

std::int32_t Operator::inputs() const {
  switch (kind) {
    case Kind::kMatmul: return contract::CodebookMatMul::kInputCount;
    case Kind::kMatmulLowRank: return contract::CodebookMatMulLowRank::kInputCount;
    default: return contract::CodebookGather::kInputCount;
  }
}

std::string Operator::check() const {
  if (in_features < 1 || out_features < 1) {
    return "in_features is " + std::to_string(in_features) + " and out_features is " + std::to_string(out_features) +
           "; both must be given and positive";
  }
  return offset == 0 || offset == 1 ? "" : "offset is " + std::to_string(offset) + "; it must be 0 or 1";
}

bool Operator::allows(std::int32_t position, DataType type, DataType x_type) const {
  const bool wide = type == DataType::kFLOAT || type == DataType::kHALF;
  if (position == inputs()) return type == (kind == Kind::kGather ? DataType::kFLOAT : x_type);
  switch (position) {
    case Branch::kX: return kind == Kind::kGather ? type == DataType::kINT64 : wide || type == DataType::kBF16;
    case Branch::kCodes:
    case Branch::kParams:
    case Branch::kDown:
    case Branch::kUp: return type == DataType::kINT8;
    case Branch::kLevels: return type == DataType::kHALF;
    case Branch::kStep:
    case Branch::kDownScale:
    case Branch::kUpScale: return wide;
    default: return type == DataType::kFLOAT;
  }
}

std::string read_shapes(const Operator& op, const Dims* dims, cuda::Matmul* out) {
  *out = cuda::Matmul{};
  out->int8_activations = op.int8;
  cuda::PackedWeight& w = out->weight;
  w.rows = op.out_features;
  w.columns = op.in_features;
  w.bits = op.bits;
  w.has_offset = op.offset == 1;
  const Dims& x = dims[Branch::kX];
  if (op.kind != Kind::kGather && (x.nbDims < 1 || (x.d[x.nbDims - 1] != op.in_features && x.d[x.nbDims - 1] != kAny))) {
    return wrong(Branch::kX, x, "(..., " + std::to_string(op.in_features) + ")");
  }
  const std::int64_t panels = cuda::ceil_div(op.out_features, cuda::kPanel);
  const std::int64_t blocks = cuda::ceil_div(op.in_features, cuda::kBlock);
  if (!fits(dims[Branch::kCodes], {panels, blocks, op.bits, cuda::kPanel, 4})) {
    return wrong(Branch::kCodes, dims[Branch::kCodes], shape({panels, blocks, op.bits, cuda::kPanel, 4}));
  }
  if (std::string problem = read_params(op, dims, &w); !problem.empty()) return problem;
  if (op.kind == Kind::kGather) return "";
  out->bias_full = fits(dims[Branch::kBias], {op.out_features});
  if (!out->bias_full && !fits(dims[Branch::kBias], {1})) {
    return wrong(Branch::kBias, dims[Branch::kBias], shape({op.out_features}) + " or (1)");
  }
  return op.kind == Kind::kMatmulLowRank ? read_branch(op, dims, out) : "";
}

std::int64_t count_items(const Operator& op, const Dims& dims) {
  std::int64_t count = 1;
  for (std::int32_t i = 0; i < dims.nbDims - (op.kind == Kind::kGather ? 0 : 1); ++i) {
    if (dims.d[i] < 0) return -1;
    count *= dims.d[i];
  }
  return count;
}

std::string text_of(const Dims& dims) {
  std::string text = "(";
  for (std::int32_t i = 0; i < dims.nbDims; ++i) text += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
  return text + ")";
}

}  // namespace rankbook::trt
