// A gang's first rank as JobHost sees it: every call is told to the other ranks first, then all do
// it. Nothing is served here; engines load what is published. Device thread of the first rank.
#pragma once

#include "worker/runtime/gang_rank.h"
#include "worker/runtime/job_model.h"

#include <memory>
#include <string>

namespace tandem::worker::runtime {

class GangModel final : public JobModel {
 public:
  /// `rank` outlives it. `model_path`: the verified base on this host.
  GangModel(GangRank& rank, std::string model_path, data::Encoder encoder)
      : rank_(rank), model_path_(std::move(model_path)), encoder_(std::move(encoder)) {}

  [[nodiscard]] const data::Encoder& encoder() const override { return encoder_; }
  [[nodiscard]] DType dtype() const override { return rank_.dtype(); }
  Result<std::unique_ptr<JobSession>> open_session(const protocol::TrainSettings& settings,
                                                   std::shared_ptr<const data::Dataset> train,
                                                   std::shared_ptr<const data::Dataset> eval,
                                                   const ResumeFrom& from) override;
  [[nodiscard]] bool stores_in_parts() const override { return true; }
  Status install_adapter(const Digest&, std::shared_ptr<const model::AdapterWeights>) override {
    return {};
  }

 private:
  GangRank& rank_;
  const std::string model_path_;
  const data::Encoder encoder_;
};

}  // namespace tandem::worker::runtime
