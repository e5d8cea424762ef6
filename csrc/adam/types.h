// The types that a kernel is built for: each kind of gradient, and whole or split master weights.
//
// In an unnamed namespace, so that each translation unit has its own copy (see vector_avx2.h).
#ifndef OFFLOAD_ADAM_TYPES_H_
#define OFFLOAD_ADAM_TYPES_H_

#include <type_traits>

#include "adam/element.h"

namespace offload::adam {
namespace {

// Calls function(Gradient{}, std::bool_constant<split>{}) with the types that the arguments name.
template <typename Function>
void WithTypes(ElementType gradient, bool split, const Function& function) {
  const auto with = [&](auto element) {
    split ? function(element, std::true_type{}) : function(element, std::false_type{});
  };
  switch (gradient) {
    case ElementType::kFloat32:
      return with(float{});
    case ElementType::kBFloat16:
      return with(BFloat16{});
    case ElementType::kFloat16:
      return with(Float16{});
  }
}

}  // namespace
}  // namespace offload::adam

#endif  // OFFLOAD_ADAM_TYPES_H_
