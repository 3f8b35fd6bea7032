#include "worker/runtime/gang_model.h"

namespace tandem::worker::runtime {
namespace {

class GangSession final : public JobSession {
 public:
  explicit GangSession(GangRank& rank) : rank_(rank) {}

  Result<train::SliceEvent> run_slice() override {
    rank_.wire().tell(GangOp::kSlice);
    return rank_.run_slice();
  }
  [[nodiscard]] std::int64_t step() const override { return rank_.session().step(); }
  [[nodiscard]] std::int64_t total_steps() const override { return rank_.session().total_steps(); }
  [[nodiscard]] const model::LoraConfig& lora() const override { return rank_.session().lora(); }
  Result<train::TrainState> export_state() override {
    rank_.wire().tell(GangOp::kExport);
    return rank_.export_state();
  }
  std::shared_ptr<const model::AdapterWeights> snapshot_adapter() override { return nullptr; }
  Result<model::FlatAdapter> flat_adapter(DType dtype) override {
    TANDEM_ASSIGN_OR_RETURN(const auto state, export_state());
    return adapter_of_state(rank_.config(), lora(), state, dtype);
  }
  std::shared_ptr<const model::AdapterWeights> build_adapter(const model::FlatAdapter&) override {
    return nullptr;
  }
  double probe(const std::vector<std::int32_t>&, const model::FlatAdapter& published,
               std::shared_ptr<const model::AdapterWeights>) override {
    rank_.wire().tell(GangOp::kCompare, encode_adapter(published));
    return rank_.compare(published);
  }
  void begin_checkpoint() override {
    rank_.wire().tell(GangOp::kSnapshot);
    rank_.begin_checkpoint();
  }
  std::optional<Result<std::string>> stored_checkpoint(const Digest& base_model,
                                                       const storage::PeftConfig* config) override {
    rank_.wire().tell(GangOp::kStored);
    const auto ranks = rank_.stored_checkpoint();
    if (!ranks) return std::nullopt;
    if (!ranks->ok()) return Result<std::string>(ranks->status());
    return checkpoint_manifest(base_model, config, **ranks);
  }
  Status write_model(const std::string& folder, DType dtype) override {
    const ModelPlace place{folder, dtype, {}};
    rank_.wire().tell(GangOp::kWriteModel, place.encode());
    return rank_.write_model(place);
  }
  Result<double> probe_model(const std::vector<std::int32_t>& prompt, const std::string& folder,
                             DType dtype) override {
    const ModelPlace place{folder, dtype, prompt};
    rank_.wire().tell(GangOp::kProbeModel, place.encode());
    return rank_.probe_model(place);
  }

 private:
  GangRank& rank_;
};

}  // namespace

Result<std::unique_ptr<JobSession>> GangModel::open_session(
    const protocol::TrainSettings& settings, std::shared_ptr<const data::Dataset> train,
    std::shared_ptr<const data::Dataset> eval, const ResumeFrom& from) {
  const GangPlan plan{model_path_,     settings,        std::move(train),
                      std::move(eval), from.base_model, from.manifest};
  rank_.wire().tell(GangOp::kOpen, plan.encode());
  TANDEM_RETURN_IF_ERROR(rank_.open(plan));
  return std::unique_ptr<JobSession>(std::make_unique<GangSession>(rank_));
}

}  // namespace tandem::worker::runtime
