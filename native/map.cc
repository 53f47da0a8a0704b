#include <bpf/bpf.h>
#include <bpf/btf.h>

#include <cerrno>
#include <cstring>
#include <unordered_set>
#include <vector>

#include "arguments.h"
#include "classes.h"

static bool IsPerCpu(uint32_t type) {
	return type == BPF_MAP_TYPE_PERCPU_HASH || type == BPF_MAP_TYPE_PERCPU_ARRAY || type == BPF_MAP_TYPE_LRU_PERCPU_HASH ||
	       type == BPF_MAP_TYPE_PERCPU_CGROUP_STORAGE;
}

static bool HasWalkableKeys(const bpf_map_info& spec) {
	return spec.type != BPF_MAP_TYPE_RINGBUF && spec.type != BPF_MAP_TYPE_SK_STORAGE && spec.key_size > 0;
}

/* A per-CPU lookup fills a slot for every POSSIBLE CPU, each rounded up to 8 (libbpf.h, bpf_map__lookup_elem): value_size would be overrun. */
size_t Map::LookupSize() const {
	return IsPerCpu(spec_.type) ? ((spec_.value_size + 7) & ~7U) * static_cast<size_t>(libbpf_num_possible_cpus()) : spec_.value_size;
}

Napi::Function Map::Define(Napi::Env env) {
	return DefineClass(env, "BpfMap", {
		InstanceMethod<&Map::Info>("info"),
		InstanceMethod<&Map::GetBtf>("btf"),
		InstanceMethod<&Map::Lookup>("lookup"),
		InstanceMethod<&Map::Update>("update"),
		InstanceMethod<&Map::Delete>("delete"),
		InstanceMethod<&Map::NextKey>("nextKey"),
		InstanceMethod<&Map::Entries>("entries"),
		InstanceMethod<&Map::Count>("count"),
		InstanceMethod<&Map::Pin>("pin"),
		InstanceMethod<&Map::Close>("close"),
		InstanceAccessor<&Map::Fd>("fd"),
	});
}

Napi::Object Map::Wrap(Napi::Env env, int fd, const std::string& subject) {
	return Adopt(env, &Instance::map, {fd, -1, subject});
}

Map& Map::From(const Napi::CallbackInfo& info, size_t index, const char* name) {
	if (!info[index].IsObject() || !info[index].As<Napi::Object>().InstanceOf(Instance::Of(info.Env()).map.Value())) {
		throw Napi::TypeError::New(info.Env(), std::string("Expected `") + name + "` to be a BpfMap");
	}
	return *Map::Unwrap(info[index].As<Napi::Object>());
}

Map::Map(const Napi::CallbackInfo& info) : ObjectWrap(info), FdHandle(info.Env()) {
	uint32_t size = sizeof(spec_);
	if (bpf_obj_get_info_by_fd(fd(info.Env()), &spec_, &size)) {
		ThrowErrno(info.Env(), errno, "bpf(BPF_OBJ_GET_INFO_BY_FD)", subject());
	}
}

Napi::Value Map::Fd(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), fd(info.Env())); }

Napi::Value Map::Info(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	bpf_map_info now{};
	uint32_t size = sizeof(now);
	if (bpf_obj_get_info_by_fd(fd(env), &now, &size)) {
		ThrowErrno(env, errno, "bpf(BPF_OBJ_GET_INFO_BY_FD)", subject());
	}
	Napi::Object result = Napi::Object::New(env);
	result.Set("id", now.id);
	result.Set("name", now.name);
	result.Set("type", now.type);
	result.Set("keySize", now.key_size);
	result.Set("valueSize", now.value_size);
	result.Set("maxEntries", now.max_entries);
	result.Set("flags", now.map_flags);
	result.Set("lookupSize", static_cast<double>(LookupSize()));
	result.Set("btfId", now.btf_id);
	return result;
}

Napi::Value Map::GetBtf(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	fd(env);
	if (spec_.btf_id == 0) {
		return env.Undefined();
	}
	btf* types = btf__load_from_kernel_by_id(spec_.btf_id);
	if (!types) {
		ThrowErrno(env, errno, "bpf(BPF_BTF_GET_FD_BY_ID)", subject());
	}
	uint32_t size = 0;
	const void* raw = btf__raw_data(types, &size);
	Napi::Value bytes = raw ? CopyBytes(env, raw, size) : env.Undefined();
	btf__free(types);
	return bytes;
}

Napi::Value Map::Lookup(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	int map = fd(env);
	Bytes key = BytesArgument(info, 0, "key", spec_.key_size);
	Napi::Uint8Array value = Napi::Uint8Array::New(env, LookupSize());
	if (bpf_map_lookup_elem(map, key.data, value.Data())) {
		if (errno == ENOENT) {
			return env.Undefined();
		}
		ThrowErrno(env, errno, "bpf(BPF_MAP_LOOKUP_ELEM)", subject());
	}
	return value;
}

Napi::Value Map::Update(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	int map = fd(env);
	Bytes key = BytesArgument(info, 0, "key", spec_.key_size);
	Bytes value = BytesArgument(info, 1, "value", LookupSize());
	uint64_t flags = info[2].IsUndefined() ? uint64_t{BPF_ANY} : static_cast<uint64_t>(IntegerArgument(info, 2, "flags", 0, UINT32_MAX));
	if (bpf_map_update_elem(map, key.data, value.data, flags)) {
		ThrowErrno(env, errno, "bpf(BPF_MAP_UPDATE_ELEM)", subject());
	}
	return env.Undefined();
}

Napi::Value Map::Delete(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	int map = fd(env);
	Bytes key = BytesArgument(info, 0, "key", spec_.key_size);
	if (bpf_map_delete_elem(map, key.data)) {
		if (errno == ENOENT) {
			return Napi::Boolean::New(env, false);
		}
		ThrowErrno(env, errno, "bpf(BPF_MAP_DELETE_ELEM)", subject());
	}
	return Napi::Boolean::New(env, true);
}

Napi::Value Map::NextKey(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	int map = fd(env);
	const uint8_t* key = info[0].IsUndefined() ? nullptr : BytesArgument(info, 0, "key", spec_.key_size).data;
	Napi::Uint8Array next = Napi::Uint8Array::New(env, spec_.key_size);
	if (bpf_map_get_next_key(map, key, next.Data())) {
		if (errno == ENOENT) {
			return env.Undefined();
		}
		ThrowErrno(env, errno, "bpf(BPF_MAP_GET_NEXT_KEY)", subject());
	}
	return next;
}

/* False where this kernel has no batch lookup for this type (LPM tries before 5.12, sockmaps). */
bool Map::CollectBatches(Napi::Env env, std::vector<uint8_t>& keys, std::vector<uint8_t>& values, size_t& count) {
	int map = fd(env);
	size_t value_size = LookupSize();
	uint32_t chunk = std::min<uint32_t>(4096, std::max<uint32_t>(spec_.max_entries, 1));
	/* For hashes a bucket number, for others a key. */
	std::vector<uint8_t> in(std::max<size_t>(spec_.key_size, 4)), out(in.size());
	bool first = true;
	for (;;) {
		keys.resize((count + chunk) * spec_.key_size);
		values.resize((count + chunk) * value_size);
		uint32_t got = chunk;
		int result = bpf_map_lookup_batch(map, first ? nullptr : in.data(), out.data(), keys.data() + count * spec_.key_size,
		                                  values.data() + count * value_size, &got, nullptr);
		int error = result ? errno : 0;
		if (error == ENOSPC) {
			/* One bucket has more than fits: nothing was given out, ask again for more. */
			if (chunk >= spec_.max_entries) {
				return false;
			}
			chunk = std::min(chunk * 4, spec_.max_entries);
			continue;
		}
		if (error && error != ENOENT) {
			if (first && (error == EINVAL || error == EOPNOTSUPP || error == 524)) {
				return false;
			}
			ThrowErrno(env, error, "bpf(BPF_MAP_LOOKUP_BATCH)", subject());
		}
		count += got;
		if (error == ENOENT) {
			return true;
		}
		/* A trie starts again from its first key when the last one given vanished; a hash goes by bucket and ends. */
		if (count > 2ULL * spec_.max_entries) {
			return false;
		}
		first = false;
		in.swap(out);
	}
}

/*
 * A key that vanishes makes BPF_MAP_GET_NEXT_KEY start again from the first one: remember what was seen, and stop after a bounded number
 * of restarts.
 */
void Map::CollectOneByOne(Napi::Env env, std::vector<uint8_t>& keys, std::vector<uint8_t>* values, size_t& count) {
	int map = fd(env);
	std::unordered_set<std::string> seen;
	std::string key(spec_.key_size, 0), next(spec_.key_size, 0);
	std::vector<uint8_t> value(LookupSize());
	uint64_t bound = 3ULL * spec_.max_entries + 16;
	for (bool first = true; bound-- > 0; first = false) {
		if (bpf_map_get_next_key(map, first ? nullptr : key.data(), next.data())) {
			if (errno != ENOENT) {
				ThrowErrno(env, errno, "bpf(BPF_MAP_GET_NEXT_KEY)", subject());
			}
			return;
		}
		key = next;
		if (!seen.insert(key).second) {
			continue;
		}
		if (values) {
			if (bpf_map_lookup_elem(map, key.data(), value.data())) {
				if (errno != ENOENT) {
					ThrowErrno(env, errno, "bpf(BPF_MAP_LOOKUP_ELEM)", subject());
				}
				continue;
			}
			values->insert(values->end(), value.begin(), value.end());
		}
		keys.insert(keys.end(), key.begin(), key.end());
		count++;
	}
}

/* Keys that a trie gave twice, as it started again. */
void Map::DropRepeated(std::vector<uint8_t>& keys, std::vector<uint8_t>& values, size_t& count) const {
	std::unordered_set<std::string> seen;
	size_t key_size = spec_.key_size, value_size = LookupSize(), kept = 0;
	for (size_t i = 0; i < count; i++) {
		if (seen.emplace(reinterpret_cast<char*>(&keys[i * key_size]), key_size).second) {
			memmove(&keys[kept * key_size], &keys[i * key_size], key_size);
			memmove(&values[kept * value_size], &values[i * value_size], value_size);
			kept++;
		}
	}
	count = kept;
}

Napi::Value Map::Entries(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	fd(env);
	std::vector<uint8_t> keys, values;
	size_t count = 0;
	if (HasWalkableKeys(spec_) && !CollectBatches(env, keys, values, count)) {
		keys.clear();
		values.clear();
		count = 0;
		CollectOneByOne(env, keys, &values, count);
	}
	if (spec_.type == BPF_MAP_TYPE_LPM_TRIE) {
		DropRepeated(keys, values, count);
	}
	Napi::Object result = Napi::Object::New(env);
	result.Set("count", static_cast<double>(count));
	result.Set("keys", CopyBytes(env, keys.data(), count * spec_.key_size));
	result.Set("values", CopyBytes(env, values.data(), count * LookupSize()));
	return result;
}

Napi::Value Map::Count(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	fd(env);
	std::vector<uint8_t> keys;
	size_t count = 0;
	if (HasWalkableKeys(spec_)) {
		CollectOneByOne(env, keys, nullptr, count);
	}
	return Napi::Number::New(env, static_cast<double>(count));
}

Napi::Value Map::Pin(const Napi::CallbackInfo& info) {
	std::string path = TextArgument(info, 0, "path");
	if (bpf_obj_pin(fd(info.Env()), path.c_str())) {
		ThrowErrno(info.Env(), errno, "bpf(BPF_OBJ_PIN)", path);
	}
	return info.Env().Undefined();
}

Napi::Value Map::Close(const Napi::CallbackInfo& info) {
	CloseOnce();
	return info.Env().Undefined();
}
