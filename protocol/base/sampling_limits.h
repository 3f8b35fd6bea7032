// Ranges of what a request may ask of sampling, which the coordinator, models' defaults and engines
// check alike.
#pragma once

#include <cstddef>

namespace tandem {

inline constexpr float kTemperatureMax = 10.0f;        ///< from 0
inline constexpr float kRepetitionPenaltyMax = 10.0f;  ///< above 0
inline constexpr float kTokenPenaltyMax = 2.0f;        ///< presence and frequency: [-max, max]
inline constexpr std::size_t kStopStringsMax = 16;

}  // namespace tandem
