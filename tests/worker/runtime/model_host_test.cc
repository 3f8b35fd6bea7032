// An engine's device memory: adapters, and a job that trains beside serving, stay within
// memory_bytes_max.
#include "worker/runtime/model_host.h"

#include "kernels/cpu/cpu_backend.h"
#include "protocol/base/clock.h"
#include "protocol/base/units.h"
#include "tests/support/tiny_model.h"
#include "worker/runtime/job_estimate.h"
#include "worker/train/train_session.h"

#include <gtest/gtest.h>

#include <stdlib.h>

#include <filesystem>
#include <memory>

namespace tandem::worker::runtime {
namespace {

constexpr std::int64_t kMiB = 1 << 20;

class ModelHostMemory : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "tandem-host-XXXXXX";
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    test::write_tiny_model(folder_, 3);
    options_.dtype = DType::kF32;
    options_.kv_bytes_max = 4 * kMiB;
    options_.memory_bytes_max = std::int64_t{1} << 40;
    options_.batch_tokens_max = 64;
    options_.running_max = 4;
    open();
  }
  void TearDown() override {
    host_.reset();
    std::filesystem::remove_all(folder_);
  }
  void open() {
    host_.reset();
    backend_ = kernels::make_cpu_backend({1, 0});
    protocol::ModelRef ref;
    ref.name = "tiny";
    ref.digest = sha256("tiny");
    auto host = ModelHost::open(backend_, ref, folder_, options_);
    ASSERT_TRUE(host.ok()) << host.status().message();
    host_ = std::move(*host);
    ASSERT_TRUE(host_->start(clock_, [] { return true; }).ok());
  }
  /// One layer's q: a few KiB, which take a page of the ledger's.
  [[nodiscard]] std::vector<model::HostAdapterTensor> adapter() const {
    model::HostAdapterTensor q;
    q.rank = 2;
    q.scale = 1.0f;
    const auto width = static_cast<std::size_t>(host_->config().width);
    q.a.assign(2 * width, 0.1f);
    q.b.assign(width * 2, 0.1f);
    return {q};
  }
  Status load(int i) { return host_->load_adapter(name(i), adapter()); }
  /// A request of two tokens.
  Status use(int i) {
    serve::GenerateRequest request;
    request.id = RequestId(str("r", i));
    request.adapter = name(i);
    request.prompt = {1, 2, 3};
    request.sampling.max_tokens = 2;
    return host_->serve().submit(std::move(request));
  }
  static Digest name(int i) { return sha256(str("adapter", i)); }
  [[nodiscard]] std::int64_t taken() const { return backend_.ledger->live_total(); }
  [[nodiscard]] std::vector<Digest> resident() const {
    return host_->serve().stats().resident_adapters;
  }

  std::string folder_;
  ModelHostOptions options_;
  ManualClock clock_;
  kernels::Backend backend_;
  std::unique_ptr<ModelHost> host_;
};

TEST_F(ModelHostMemory, AdaptersBeyondItTakeThePlaceOfIdleOnes) {
  options_.memory_bytes_max = taken() + 3 * kernels::kMapGranularity;
  open();
  for (int i = 0; i < 8; ++i) {
    ASSERT_TRUE(load(i).ok());
    EXPECT_LE(taken(), options_.memory_bytes_max) << i;
  }
  EXPECT_EQ(resident(), (std::vector{name(7), name(6), name(5)}));
  // Those that requests use stay; what has no room is told so and may come again.
  for (int i = 5; i < 8; ++i) ASSERT_TRUE(use(i).ok());
  const Status full = load(8);
  EXPECT_EQ(full.code(), StatusCode::kBusy) << full.message();
  EXPECT_NE(full.message().find("6.0 MiB"), std::string::npos) << full.message();
  EXPECT_LE(taken(), options_.memory_bytes_max);

  options_.memory_bytes_max = taken() - 3 * kernels::kMapGranularity;
  open();
  const Status none = load(0);
  EXPECT_EQ(none.code(), StatusCode::kRefused) << none.message();
  EXPECT_NE(none.message().find("memory_bytes_max"), std::string::npos) << none.message();
}

TEST_F(ModelHostMemory, AGangsRankBesideTheEngineTakesOfItsAdaptersRoom) {
  options_.memory_bytes_max = taken() + 3 * kernels::kMapGranularity;
  open();
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(load(i).ok());
  ASSERT_TRUE(use(0).ok());
  std::int64_t gang = 2 * kernels::kMapGranularity;
  host_->leave_to_gang(gang);
  EXPECT_EQ(resident(), std::vector{name(0)}) << "those that nobody uses go at once";
  EXPECT_LE(taken(), options_.memory_bytes_max - gang);
  EXPECT_EQ(load(3).code(), StatusCode::kBusy);

  gang = 3 * kernels::kMapGranularity;
  host_->leave_to_gang(gang);
  EXPECT_EQ(resident(), std::vector{name(0)});
  while (host_->serve().has_work()) (void)host_->serve().step();
  EXPECT_TRUE(resident().empty()) << "and the others when they are idle";
  EXPECT_LE(taken(), options_.memory_bytes_max - gang);
  const Status none = load(3);
  EXPECT_EQ(none.code(), StatusCode::kRefused);
  EXPECT_NE(none.message().find("6.0 MiB of it are a gang's"), std::string::npos) << none.message();

  host_->leave_to_gang(0);
  EXPECT_TRUE(load(3).ok()) << "its end gives them their room back";
}

TEST_F(ModelHostMemory, ABaseThatDoesNotFitBesideAGangsRankIsRefusedWithTheNumbers) {
  options_.memory_bytes_max = taken() + 3 * kernels::kMapGranularity;
  protocol::ModelRef ref;
  ref.name = "tiny";
  const auto beside = [&](std::int64_t gang_bytes) {
    return ModelHost::open(backend_, ref, folder_, options_, gang_bytes).status();
  };
  EXPECT_TRUE(beside(3 * kernels::kMapGranularity).ok());
  const Status refused = beside(4 * kernels::kMapGranularity);
  EXPECT_EQ(refused.code(), StatusCode::kRefused) << refused.message();
  EXPECT_NE(refused.message().find("less 8.0 MiB of the gang's rank beside it"), std::string::npos)
      << refused.message();
}

TEST_F(ModelHostMemory, AJobThatFitsByItsEstimateStaysWithinItBesideServingAndAdapters) {
  protocol::TrainSettings settings;
  settings.max_length = 128;
  settings.per_device_train_batch_size = 4;
  settings.max_steps = 2;
  const auto need =
      estimate_engine_with_job(backend_.ops->profile(), host_->config(), options_, settings, false);
  ASSERT_TRUE(need.ok()) << need.status().message();
  options_.memory_bytes_max = need->total();
  open();
  const auto serving = taken();
  ASSERT_TRUE(load(0).ok() && load(1).ok());
  EXPECT_GT(taken(), serving) << "there is room until the job comes";
  auto rows = std::make_shared<data::Dataset>();
  for (int row = 0; row < 8; ++row) {
    data::Example& example = rows->examples.emplace_back();
    example.tokens.assign(128, 5 + row);
    example.labels.assign(128, 7);
    example.labels.back() = data::kIgnore;
  }
  auto session = host_->open_session(settings, rows, nullptr, {});
  ASSERT_TRUE(session.ok()) << session.status().message();
  EXPECT_TRUE(resident().empty());
  for (const int snapshot : {8, 9}) {
    EXPECT_TRUE(host_->install_adapter(name(snapshot), (*session)->snapshot_adapter()).ok());
    EXPECT_EQ(resident().at(0), name(snapshot));
  }
  {
    // While one is stored it is nobody's yet, and takes of the room of others all the same.
    const auto stored = (*session)->snapshot_adapter();
    ASSERT_NE(stored, nullptr);
    const auto before = taken();
    (void)load(0);
    (void)load(1);
    EXPECT_EQ(taken(), before);
    EXPECT_TRUE(host_->install_adapter(name(9), stored).ok());
  }
  // Requests keep the snapshot that they began with, and none is made that has no room beside it.
  ASSERT_TRUE(use(9).ok());
  EXPECT_EQ((*session)->snapshot_adapter(), nullptr);
  EXPECT_EQ(resident(), std::vector{name(9)});
  while (host_->serve().has_work()) (void)host_->serve().step();
  EXPECT_NE((*session)->snapshot_adapter(), nullptr);
  while ((*session)->step() < (*session)->total_steps()) ASSERT_TRUE((*session)->run_slice().ok());
  EXPECT_LE(backend_.ledger->peak_total(), options_.memory_bytes_max);
  // What serving has beside the cache is no part of the session's own dry run.
  EXPECT_GT(backend_.ledger->peak_total() + need->job.of(kernels::MemoryKind::kAdapters),
            need->job.peak_total + options_.kv_bytes_max);
  session->reset();
  EXPECT_TRUE(load(0).ok()) << "its end gives adapters their room back";
}

}  // namespace
}  // namespace tandem::worker::runtime
