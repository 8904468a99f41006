// Reads a packed layer from the types and shapes of its constants, and says in a sentence what does not fit: the same
// for ONNX Runtime on CPU and GPU and for TensorRT. What is allowed is the table that contract.h holds, generated from
// plugins/forms.py: parts (params, bias, factors), each in one of a few forms, a form a list of constants whose sizes
// are numbers or letters.
//
// A layer is legal where every part has a form and all letters agree. Elements are looked at by check_elements, where
// they are at hand.
#include "shims/view.h"

#include <cmath>
#include <iterator>

#include "kernels/cpu/simd/half.h"

namespace rankbook {
namespace {

using Names = contract::CodebookMatMul;  // every kind has its attributes
using contract::Form;
using contract::Part;
using contract::Stored;

using contract::kLargestSize;

// An array by letter and not a map: this runs for every context of an engine, and for every node.
using Sizes = std::array<int64_t, std::size(contract::kLetters)>;  // by letter; 0 for those not met yet

// With the numbers that are known and letters for the others: "(3, G, 2, 32)" tells what the file may still choose.
std::string spell(const Stored& stored, const Sizes& sizes) {
  std::string out = "(";
  for (int i = 0; i < stored.axes; ++i) {
    const int size = stored.sizes[i];
    const int64_t known = size < 0 ? sizes[static_cast<size_t>(-size)] : size;
    out += (i == 0 ? "" : ", ") + (known > 0 ? std::to_string(known) : contract::kLetters[-size]);
  }
  return out + ")";
}

// Whether a constant has this shape; adds the letters met to `sizes`.
// Letters are bound by the first constant that has them: the groups of params are those of step, and a later constant
// that differs is the one that is named.
bool match_shape(const Stored& stored, const Shape& shape, Sizes* sizes) {
  if (shape.axes != static_cast<size_t>(stored.axes)) return false;
  for (int i = 0; i < stored.axes; ++i) {
    const int64_t have = shape.at[static_cast<size_t>(i)];
    // The kernels count in 32 bits.
    if (have < 1 || have > kLargestSize) return false;
    // Negative sizes are letters.
    int64_t want = stored.sizes[i];
    if (want < 0) {
      int64_t& known = (*sizes)[static_cast<size_t>(-want)];
      if (known == 0) known = have;
      want = known;
    }
    if (have != want) return false;
  }
  return true;
}

// How many constants of a form fit, one after another.
// The length of the fitting beginning, not only yes or no: the form that fits furthest is the one that a sentence
// compares with.
int match(const Form& form, const Constant* constants, Sizes* sizes) {
  int fitting = 0;
  while (fitting < form.count) {
    const Stored& stored = form.constants[fitting];
    const Constant& given = constants[stored.input];
    if (given.type != stored.type || !match_shape(stored, given.shape, sizes)) break;
    ++fitting;
  }
  return fitting;
}

// The first constant that no form explains, what it is and what it could be beside those before it.
// A shape that fits a form of another type is told by its type, because the shape is then the smaller hint.
std::string mismatch(const Part& part, const Constant* constants, const Sizes& before, int fitting, const std::string& suffix) {
  std::string shapes, types, beside;
  bool shape_fits = false;
  for (int i = 0; i < part.count; ++i) {
    Sizes sizes = before;
    if (match(part.forms[i], constants, &sizes) != fitting) continue;
    const Stored& stored = part.forms[i].constants[fitting];
    // Each alternative once: forms often differ in another constant than the one that is told about.
    const auto add = [](std::string* to, const std::string& text) {
      if (to->find(text) == std::string::npos) *to += (to->empty() ? "" : " or ") + text;
    };
    Sizes tried = sizes;
    if (match_shape(stored, constants[stored.input].shape, &tried)) {
      // Then the type is what is wrong.
      shape_fits = true;
      add(&types, contract::kTypes[static_cast<int>(stored.type)]);
    }
    add(&shapes, spell(stored, sizes));
  }
  const int input = part.forms[0].constants[fitting].input;
  const Constant& given = constants[input];
  if (fitting > 0) {
    const int other = part.forms[0].constants[0].input;
    beside = std::string(" beside ") + Port::kInputs[other] + suffix + " of shape " + constants[other].shape.text();
  }
  const std::string name = std::string("input ") + Port::kInputs[input] + suffix;
  // Both sentences end alike, with what stands beside the constant: forms are told apart by the one before it.
  if (shape_fits) return name + " is " + contract::kTypes[static_cast<int>(given.type)] + "; it must be " + types + beside;
  return name + " has shape " + given.shape.text() + "; it must be " + shapes + beside;
}

// Last, when all letters are known: what every constant agrees on may still be more than a runtime takes.
std::string check_sizes(const Layer& layer, const Limits& limits) {
  // More planes than levels would be no approximation any more.
  const int64_t width = int64_t{1} << layer.bits;
  const int64_t most = limits.planes < width ? limits.planes : width;
  // Sizes of attributes that no constant shows: a runtime's own limits.
  if (layer.columns > limits.columns) {
    return "in_features is " + std::to_string(layer.columns) + "; this runtime takes up to " + std::to_string(limits.columns);
  }
  if (layer.planes() < 1 || layer.planes() > most) {
    return "levels has " + std::to_string(layer.param_planes) + " rows and offset is " + std::to_string(layer.has_offset ? 1 : 0) +
           ": there are " + std::to_string(layer.planes()) + " planes of levels; this runtime takes 1 to " + std::to_string(most);
  }
  // Multiples of 16 up to 256, or the whole row: the limits of all kernels together, on CPU and GPU.
  const int64_t group = layer.columns / layer.groups;
  const bool whole = layer.groups == 1;
  const bool fits = group % contract::kGroupMultiple == 0 && group <= contract::kLargestGroup;
  if (layer.columns % layer.groups != 0 || (!whole && !fits)) {
    return std::to_string(layer.groups) + " groups cannot cut rows of " + std::to_string(layer.columns) +
           " inputs: a group must be a multiple of " + std::to_string(contract::kGroupMultiple) + " inputs up to " +
           std::to_string(contract::kLargestGroup) + ", or the whole row";
  }
  return "";
}

}  // namespace

// Before any shape: a wrong in_features would make every constant look wrong.
std::string check_attributes(const LayerAttributes& given, const std::string& suffix) {
  struct Range {
    const char* name;
    int64_t value, low, high;
  };
  for (const Range& each : {Range{Names::kInFeatures, given.in_features, 1, kLargestSize},
                            Range{Names::kOutFeatures, given.out_features, 1, kLargestSize},
                            Range{Names::kOffset, given.offset, 0, 1}}) {
    if (each.value >= each.low && each.value <= each.high) continue;
    return "attribute " + (each.name + suffix) + " is " + std::to_string(each.value) + "; it must be " +
           std::to_string(each.low) + (each.high == 1 ? " or " : " to ") + std::to_string(each.high);
  }
  return "";
}

std::string unstack(Constant* constants, size_t inputs, int64_t* experts) {
  *experts = 0;
  for (size_t input = 1; input < inputs; ++input) {
    Shape& shape = constants[input].shape;
    const std::string name = std::string("input ") + Port::kInputs[input];
    if (!shape.has(2)) return name + " has shape " + shape.text() + "; it must have an axis of experts before those of one";
    const int64_t count = shape.at[0];
    if (count < 1 || (input > 1 && count != *experts)) {
      const std::string allowed = input > 1 ? "as many as input " + std::string(Port::kInputs[1]) + " has, " + std::to_string(*experts) : "at least 1";
      return name + " is of " + std::to_string(count) + " experts; it must be of " + allowed;
    }
    *experts = count;
    Shape one;
    one.axes = shape.axes - 1;
    for (size_t axis = 0; axis < one.axes; ++axis) one.at[axis] = shape.at[axis + 1];
    shape = one;
  }
  return "";
}

std::string read_layer(const LayerAttributes& attributes, const Constant* constants, size_t inputs, const Limits& limits,
                       const std::string& suffix, Layer* out) {
  if (std::string problem = check_attributes(attributes, suffix); !problem.empty()) return problem;
  // The sizes that attributes give bind their letters first: N, K, and what follows from them.
  *out = Layer{};
  out->bits = attributes.bits;
  out->rows = attributes.out_features;
  out->columns = attributes.in_features;
  out->has_offset = attributes.offset == 1;
  out->inputs = inputs;
  Sizes sizes{};
  const auto size_of = [&](contract::Letter letter) -> int64_t& { return sizes[static_cast<size_t>(-letter)]; };
  size_of(contract::kLetterN) = out->rows;
  size_of(contract::kLetterK) = out->columns;
  // Rows and inputs that fill a panel or a block up are in the file, with any codes.
  size_of(contract::kLetterNP) = (out->rows + contract::kPanel - 1) / contract::kPanel;
  size_of(contract::kLetterKB) = (out->columns + contract::kBlock - 1) / contract::kBlock;
  size_of(contract::kLetterBits) = out->bits;
  size_of(contract::kLetterL) = int64_t{1} << out->bits;
  // Parts stand alone: their forms are tried one after the other, and letters go on from part to part.
  for (int part = 0; part < contract::kPartCount; ++part) {
    // Operators without a branch lack the factors, look-ups the bias as well.
    if (!out->has_part(part)) continue;
    const Part& allowed = contract::kParts[part];
    int best = 0;
    for (int form = 0; form < allowed.count; ++form) {
      Sizes found = sizes;
      const int fitting = match(allowed.forms[form], constants, &found);
      if (fitting == allowed.forms[form].count) {
        out->forms[static_cast<size_t>(part)] = form;
        // Later parts must agree with the letters of this one.
        sizes = found;
        best = -1;
        break;
      }
      best = fitting > best ? fitting : best;
    }
    if (best >= 0) return mismatch(allowed, constants, sizes, best, suffix);
  }
  // What the constants alone decide.
  out->groups = size_of(contract::kLetterG);
  out->param_planes = size_of(contract::kLetterQ);
  out->rank = size_of(contract::kLetterR);
  return check_sizes(*out, limits);
}

// Once a session, over all constants. A NaN in a step would otherwise come out as NaN tokens, far from its cause.
std::string check_elements(const Stored& stored, contract::Type type, const void* elements, int64_t count,
                           const std::string& suffix) {
  const auto each = [&](auto&& is_wrong) {
    for (int64_t i = 0; i < count; ++i) {
      if (is_wrong(i)) return true;
    }
    return false;
  };
  // Elements are looked at in their stored types; no copy is made.
  const auto value_of = [&](int64_t i) {
    switch (type) {
      case contract::Type::kFloat32:
        return static_cast<const float*>(elements)[i];
      case contract::Type::kFloat16:
        return half_to_float(static_cast<const uint16_t*>(elements)[i]);
      default:
        return static_cast<float>(static_cast<const int8_t*>(elements)[i]);
    }
  };
  const std::string name = std::string("input ") + Port::kInputs[stored.input] + suffix;
  // A placeholder with another value is a file that somebody has edited, or a newer form that this library does not
  // know.
  if (stored.value != contract::kData) {
    if (!each([&](int64_t i) { return value_of(i) != static_cast<float>(stored.value); })) return "";
    return name + " is a placeholder and must hold " + std::to_string(stored.value) + "; it holds " + std::to_string(value_of(0));
  }
  if (stored.type == contract::Type::kInt8 || !each([&](int64_t i) { return !std::isfinite(value_of(i)); })) return "";
  return name + " holds NaN or infinity; the file is damaged: write or copy it again";
}

}  // namespace rankbook
