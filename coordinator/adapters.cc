#include "coordinator/adapters.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace tandem::coordinator {
namespace {

const std::string kVersionsPrefix = "versions/";

void move(const Context& context, AliasRecord& alias, const AdapterVersionRecord& target,
          const std::string& reason) {
  alias.adapter = target.name;
  alias.version = target.version;
  alias.digest = target.digest;
  alias.history.push_back(
      {target.name, target.version, target.digest, context.now().unix_ms, reason});
  if (alias.history.size() > context.limits().alias_history_max)
    alias.history.erase(alias.history.begin());
}

AliasRecord find_or_make(const Context& context, const std::string& name) {
  const auto found = context.tables().aliases.find(name);
  if (found != context.tables().aliases.end()) return found->second;
  AliasRecord alias;
  alias.name = alias.adapter = name;
  // A name that was removed goes on counting: a version number never means two things.
  const auto last = context.tables().settings.find(kVersionsPrefix + name);
  if (last != context.tables().settings.end())
    alias.last_version =
        static_cast<std::uint32_t>(std::strtoul(last->second.c_str(), nullptr, 10));
  return alias;
}

}  // namespace

AdapterVersionRecord add_version(Context& context, const NewVersion& version) {
  AliasRecord alias = find_or_make(context, version.name);
  AdapterVersionRecord record;
  record.name = version.name;
  record.version = ++alias.last_version;
  record.digest = version.digest;
  record.base_model = version.base_model;
  record.job = version.job;
  record.created_unix_ms = context.now().unix_ms;
  record.metadata_json = version.metadata_json.empty() ? "{}" : version.metadata_json;
  if (!alias.pinned) move(context, alias, record, version.reason);
  context.put(ManifestRecord{version.digest, ManifestKind::kAdapter, version.manifest,
                             version.base_model, record.created_unix_ms});
  context.put(record);
  context.put(std::move(alias));
  return record;
}

void remove_name(Context& context, const std::string& name) {
  const auto alias = context.tables().aliases.find(name);
  if (alias == context.tables().aliases.end()) return;
  context.put(SettingRecord{kVersionsPrefix + name, std::to_string(alias->second.last_version)});
  context.put(EraseAlias{name});
}

decltype(Tables::adapters)::const_iterator version_before(const Tables& tables,
                                                          const AliasRecord& alias) {
  std::vector<const AliasChange*> line;  // without what was rolled back from
  for (const AliasChange& change : alias.history) {
    const auto same = [&](const AliasChange* c) { return c->digest == change.digest; };
    const auto before = std::find_if(line.rbegin(), line.rend(), same);
    if (change.reason.starts_with(kRollbackReason) && before != line.rend())
      line.erase(before.base(), line.end());
    else
      line.push_back(&change);
  }
  for (auto change = line.rbegin(); change != line.rend(); ++change) {
    const auto found = tables.adapters.find({(*change)->adapter, (*change)->version});
    if ((*change)->digest != alias.digest && found != tables.adapters.end()) return found;
  }
  return tables.adapters.end();
}

AliasRecord point_alias(Context& context, const std::string& alias_name,
                        const AdapterVersionRecord& target, const std::string& reason) {
  AliasRecord alias = find_or_make(context, alias_name);
  move(context, alias, target, reason);
  context.put(alias);
  return alias;
}

}  // namespace tandem::coordinator
