// Thin system calls that Node has no word for. All of them synchronous, none of them waits (but poll).
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/membarrier.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/statfs.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "classes.h"

using Info = const Napi::CallbackInfo&;

static std::string FdName(int fd) { return "fd " + std::to_string(fd); }

static Napi::Value OpenObject(Info info) {
	if (!info[0].IsString()) {
		BytesArgument(info, 0, "source");
	}
	return Instance::Of(info.Env()).object.New({info[0], info[1]});
}

/*
 * BPF_OBJ_GET and BPF_OBJ_GET_INFO_BY_FD take any kind, and a program's info read as a map's looks like one. The fd's name in /proc tells
 * the kind: anon_inode:bpf-map, bpf-prog, and for links bpf-link or, from the call that made it, bpf_link.
 */
static int OpenPinned(Info info, std::string& path, const char* kind) {
	path = TextArgument(info, 0, "path");
	int fd = bpf_obj_get(path.c_str());
	CheckErrno(info.Env(), fd, errno, "bpf(BPF_OBJ_GET)", path);
	char name[64] = {};
	if (readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), name, sizeof(name) - 1) > 0 && !strstr(name, kind)) {
		close(fd);
		ThrowErrno(info.Env(), EINVAL, "bpf(BPF_OBJ_GET)", path);
	}
	return fd;
}

static Napi::Value OpenPinnedMap(Info info) {
	std::string path;
	int fd = OpenPinned(info, path, "-map");
	return Map::Wrap(info.Env(), fd, path);
}

static Napi::Value OpenPinnedProgram(Info info) {
	std::string path;
	int fd = OpenPinned(info, path, "-prog");
	return Program::Wrap(info.Env(), fd, -1, path);
}

static Napi::Value OpenPinnedLink(Info info) {
	std::string path;
	int fd = OpenPinned(info, path, "link");
	return Link::Wrap(info.Env(), fd, path);
}

static uint32_t IdArgument(Info info) { return static_cast<uint32_t>(IntegerArgument(info, 0, "id", 0, UINT32_MAX)); }

static Napi::Value OpenMapById(Info info) {
	std::string subject = "map id " + std::to_string(IdArgument(info));
	int fd = bpf_map_get_fd_by_id(IdArgument(info));
	CheckErrno(info.Env(), fd, errno, "bpf(BPF_MAP_GET_FD_BY_ID)", subject);
	return Map::Wrap(info.Env(), fd, subject);
}

static Napi::Value OpenProgramById(Info info) {
	std::string subject = "program id " + std::to_string(IdArgument(info));
	int fd = bpf_prog_get_fd_by_id(IdArgument(info));
	CheckErrno(info.Env(), fd, errno, "bpf(BPF_PROG_GET_FD_BY_ID)", subject);
	return Program::Wrap(info.Env(), fd, -1, subject);
}

static Napi::Value OpenLinkById(Info info) {
	std::string subject = "link id " + std::to_string(IdArgument(info));
	int fd = bpf_link_get_fd_by_id(IdArgument(info));
	CheckErrno(info.Env(), fd, errno, "bpf(BPF_LINK_GET_FD_BY_ID)", subject);
	return Link::Wrap(info.Env(), fd, subject);
}

static Napi::Value Ids(Info info) {
	std::string kind = TextArgument(info, 0, "kind");
	int (*next)(uint32_t, uint32_t*) = kind == "map" ? bpf_map_get_next_id : kind == "program" ? bpf_prog_get_next_id : kind == "link" ? bpf_link_get_next_id : nullptr;
	if (!next) {
		throw Napi::TypeError::New(info.Env(), "Expected `kind` to be map, program or link");
	}
	Napi::Array ids = Napi::Array::New(info.Env());
	uint32_t id = 0;
	while (!next(id, &id)) {
		ids.Set(ids.Length(), id);
	}
	if (errno != ENOENT) {
		ThrowErrno(info.Env(), errno, "bpf(BPF_*_GET_NEXT_ID)", kind);
	}
	return ids;
}

static Napi::Value CgroupPrograms(Info info) {
	std::string path = TextArgument(info, 0, "cgroupPath");
	int type = static_cast<int>(IntegerArgument(info, 1, "attachType", 0, 1000));
	int cgroup = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	CheckErrno(info.Env(), cgroup, errno, "open", path);
	uint32_t ids[256], count = 256, flags = 0;
	int error = bpf_prog_query(cgroup, static_cast<bpf_attach_type>(type), 0, &flags, ids, &count) ? errno : 0;
	close(cgroup);
	CheckErrno(info.Env(), -error, error, "bpf(BPF_PROG_QUERY)", path);
	Napi::Array result = Napi::Array::New(info.Env());
	for (uint32_t i = 0; i < count; i++) {
		result.Set(i, ids[i]);
	}
	return result;
}

static Napi::Value EnableStats(Info info) {
	int fd = bpf_enable_stats(BPF_STATS_RUN_TIME);
	CheckErrno(info.Env(), fd, errno, "bpf(BPF_ENABLE_STATS)", "run time");
	return Napi::Number::New(info.Env(), fd);
}

/* BPF programs that are attached here run under RCU: past a grace period none that was replaced before it still runs. */
static Napi::Value WaitForPrograms(Info info) {
	if (syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0)) {
		if (errno != EINVAL) {
			ThrowErrno(info.Env(), errno, "membarrier", "MEMBARRIER_CMD_GLOBAL");
		}
		/* nohz_full has no such command; no program runs for that long. */
		usleep(100'000);
	}
	return info.Env().Undefined();
}

static Napi::Value Bind(Info info) {
	int fd = FdArgument(info, 0, "fd");
	Bytes address = BytesArgument(info, 1, "address");
	Checked(info.Env(), "bind", FdName(fd), [&] { return ::bind(fd, reinterpret_cast<sockaddr*>(address.data), static_cast<socklen_t>(address.size)); });
	return info.Env().Undefined();
}

static Napi::Value Listen(Info info) {
	int fd = FdArgument(info, 0, "fd");
	int backlog = static_cast<int>(IntegerArgument(info, 1, "backlog", 0, INT32_MAX));
	Checked(info.Env(), "listen", FdName(fd), [&] { return ::listen(fd, backlog); });
	return info.Env().Undefined();
}

static Napi::Value Connect(Info info) {
	int fd = FdArgument(info, 0, "fd");
	Bytes address = BytesArgument(info, 1, "address");
	Checked(info.Env(), "connect", FdName(fd), [&] { return ::connect(fd, reinterpret_cast<sockaddr*>(address.data), static_cast<socklen_t>(address.size)); });
	return info.Env().Undefined();
}

static Napi::Value Accept(Info info) {
	int fd = FdArgument(info, 0, "fd");
	int flags = static_cast<int>(IntegerArgumentOr(info, 1, "flags", 0)) | SOCK_CLOEXEC;
	int accepted = Checked(info.Env(), "accept4", FdName(fd), [&] { return accept4(fd, nullptr, nullptr, flags); });
	return Napi::Number::New(info.Env(), accepted);
}

template <int (*Call)(int, sockaddr*, socklen_t*)>
static Napi::Value NameOf(Info info, const char* syscall) {
	int fd = FdArgument(info, 0, "fd");
	sockaddr_storage address{};
	socklen_t size = sizeof(address);
	Checked(info.Env(), syscall, FdName(fd), [&] { return Call(fd, reinterpret_cast<sockaddr*>(&address), &size); });
	return CopyBytes(info.Env(), &address, std::min<size_t>(size, sizeof(address)));
}

static int SockName(int fd, sockaddr* address, socklen_t* size) { return getsockname(fd, address, size); }
static int PeerName(int fd, sockaddr* address, socklen_t* size) { return getpeername(fd, address, size); }
static Napi::Value Getsockname(Info info) { return NameOf<SockName>(info, "getsockname"); }
static Napi::Value Getpeername(Info info) { return NameOf<PeerName>(info, "getpeername"); }

static Napi::Value Getsockopt(Info info) {
	int fd = FdArgument(info, 0, "fd");
	int level = static_cast<int>(IntegerArgument(info, 1, "level"));
	int name = static_cast<int>(IntegerArgument(info, 2, "name"));
	std::vector<uint8_t> value(static_cast<size_t>(IntegerArgument(info, 3, "length", 0, 1 << 20)));
	socklen_t size = static_cast<socklen_t>(value.size());
	Checked(info.Env(), "getsockopt", FdName(fd), [&] { return ::getsockopt(fd, level, name, value.data(), &size); });
	return CopyBytes(info.Env(), value.data(), std::min<size_t>(size, value.size()));
}

static Napi::Value Setsockopt(Info info) {
	int fd = FdArgument(info, 0, "fd");
	int level = static_cast<int>(IntegerArgument(info, 1, "level"));
	int name = static_cast<int>(IntegerArgument(info, 2, "name"));
	Bytes value = BytesArgument(info, 3, "value");
	Checked(info.Env(), "setsockopt", FdName(fd), [&] { return ::setsockopt(fd, level, name, value.data, static_cast<socklen_t>(value.size)); });
	return info.Env().Undefined();
}

static Napi::Value Send(Info info) {
	int fd = FdArgument(info, 0, "fd");
	Bytes bytes = BytesArgument(info, 1, "bytes");
	ssize_t sent = Checked(info.Env(), "send", FdName(fd), [&] { return ::send(fd, bytes.data, bytes.size, MSG_DONTWAIT | MSG_NOSIGNAL); });
	return Napi::Number::New(info.Env(), static_cast<double>(sent));
}

static Napi::Value Receive(Info info) {
	int fd = FdArgument(info, 0, "fd");
	std::vector<uint8_t> buffer(static_cast<size_t>(IntegerArgument(info, 1, "length", 1, INT32_MAX)));
	ssize_t got = Checked(info.Env(), "recv", FdName(fd), [&] { return ::recv(fd, buffer.data(), buffer.size(), MSG_DONTWAIT); });
	return CopyBytes(info.Env(), buffer.data(), static_cast<size_t>(got));
}

static Napi::Value Unread(Info info) {
	int fd = FdArgument(info, 0, "fd"), bytes = 0;
	Checked(info.Env(), "ioctl(FIONREAD)", FdName(fd), [&] { return ioctl(fd, FIONREAD, &bytes); });
	return Napi::Number::New(info.Env(), bytes);
}

static Napi::Value WatchEdges(Info info) {
	int fd = FdArgument(info, 0, "fd");
	int watcher = Checked(info.Env(), "epoll_create1", FdName(fd), [] { return epoll_create1(EPOLL_CLOEXEC); });
	epoll_event event{.events = EPOLLIN | EPOLLET, .data = {}};
	if (epoll_ctl(watcher, EPOLL_CTL_ADD, fd, &event)) {
		int error = errno;
		close(watcher);
		ThrowErrno(info.Env(), error, "epoll_ctl", FdName(fd));
	}
	return Napi::Number::New(info.Env(), watcher);
}

static Napi::Value WaitEdge(Info info) {
	int watcher = FdArgument(info, 0, "watcher");
	int timeout_ms = static_cast<int>(IntegerArgument(info, 1, "timeoutMs", -1, INT32_MAX));
	epoll_event event{};
	int count = Checked(info.Env(), "epoll_wait", FdName(watcher), [&] { return epoll_wait(watcher, &event, 1, timeout_ms); });
	return Napi::Boolean::New(info.Env(), count > 0);
}

static Napi::Value Poll(Info info) {
	pollfd watched{FdArgument(info, 0, "fd"), static_cast<short>(IntegerArgument(info, 1, "events", 0, INT16_MAX)), 0};
	int timeout_ms = static_cast<int>(IntegerArgument(info, 2, "timeoutMs", -1, INT32_MAX));
	Checked(info.Env(), "poll", FdName(watched.fd), [&] { return ::poll(&watched, 1, timeout_ms); });
	return Napi::Number::New(info.Env(), watched.revents);
}

static Napi::Value CloseFd(Info info) {
	int fd = FdArgument(info, 0, "fd");
	Checked(info.Env(), "close", FdName(fd), [&] { return ::close(fd); });
	return info.Env().Undefined();
}

static Napi::Value Lock(Info info) {
	std::string path = TextArgument(info, 0, "path");
	std::string mode = TextArgument(info, 1, "mode");
	if (mode != "exclusive" && mode != "shared") {
		throw Napi::TypeError::New(info.Env(), "Expected `mode` to be exclusive or shared");
	}
	int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	CheckErrno(info.Env(), fd, errno, "open", path);
	if (flock(fd, (mode == "shared" ? LOCK_SH : LOCK_EX) | LOCK_NB)) {
		int error = errno;
		close(fd);
		ThrowErrno(info.Env(), error, "flock", path);
	}
	return Napi::Number::New(info.Env(), fd);
}

static Napi::Value MountBpffs(Info info) {
	std::string path = TextArgument(info, 0, "path");
	Checked(info.Env(), "mount(bpf)", path, [&] { return ::mount("bpf", path.c_str(), "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RELATIME, "mode=0700"); });
	return info.Env().Undefined();
}

static Napi::Value Unmount(Info info) {
	std::string path = TextArgument(info, 0, "path");
	Checked(info.Env(), "umount2", path, [&] { return ::umount2(path.c_str(), MNT_DETACH); });
	return info.Env().Undefined();
}

static Napi::Value FilesystemType(Info info) {
	std::string path = TextArgument(info, 0, "path");
	struct statfs status;
	Checked(info.Env(), "statfs", path, [&] { return ::statfs(path.c_str(), &status); });
	return Napi::BigInt::New(info.Env(), static_cast<uint64_t>(status.f_type));
}

/*
 * A cgroup's file handle is its 64-bit id (kernfs), as bpf_get_current_ancestor_cgroup_id gives it; so is its inode number on 64-bit
 * machines, where a sandbox forbids name_to_handle_at.
 */
static Napi::Value CgroupId(Info info) {
	std::string path = TextArgument(info, 0, "path");
	struct {
		file_handle header;
		uint8_t room[64];
	} handle{};
	handle.header.handle_bytes = sizeof(handle.room);
	int mount_id;
	uint64_t id = 0;
	if (!name_to_handle_at(AT_FDCWD, path.c_str(), &handle.header, &mount_id, 0) && handle.header.handle_bytes == sizeof(id)) {
		memcpy(&id, handle.header.f_handle, sizeof(id));
	} else {
		struct stat status;
		Checked(info.Env(), "stat", path, [&] { return stat(path.c_str(), &status); });
		id = status.st_ino;
	}
	return Napi::BigInt::New(info.Env(), id);
}

static Napi::Value Capabilities(Info info) {
	__user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
	__user_cap_data_struct data[2]{};
	Checked(info.Env(), "capget", "this process", [&] { return ::syscall(SYS_capget, &header, data); });
	return Napi::BigInt::New(info.Env(), static_cast<uint64_t>(data[1].effective) << 32 | data[0].effective);
}

static Napi::Value PossibleCpus(Info info) { return Napi::Number::New(info.Env(), libbpf_num_possible_cpus()); }

static Napi::Value OpenHandles(Info info) { return Napi::Number::New(info.Env(), static_cast<double>(Instance::Of(info.Env()).registry->open.size())); }

void DefineSystem(Napi::Env env, Napi::Object exports) {
	exports.Set("libbpfVersion", std::to_string(libbpf_major_version()) + "." + std::to_string(libbpf_minor_version()));
	struct {
		const char* name;
		Napi::Value (*call)(Info);
	} calls[] = {
		{"openObject", OpenObject},
		{"openPinnedMap", OpenPinnedMap},
		{"openPinnedProgram", OpenPinnedProgram},
		{"openPinnedLink", OpenPinnedLink},
		{"openMapById", OpenMapById},
		{"openProgramById", OpenProgramById},
		{"openLinkById", OpenLinkById},
		{"ids", Ids},
		{"cgroupPrograms", CgroupPrograms},
		{"enableStats", EnableStats},
		{"waitForPrograms", WaitForPrograms},
		{"openRingBuffer", OpenRingBuffer},
		{"openNetns", OpenNetns},
		{"netnsOfSocket", NetnsOfSocket},
		{"createNetns", CreateNetns},
		{"bind", Bind},
		{"listen", Listen},
		{"connect", Connect},
		{"accept", Accept},
		{"getsockname", Getsockname},
		{"getpeername", Getpeername},
		{"getsockopt", Getsockopt},
		{"setsockopt", Setsockopt},
		{"poll", Poll},
		{"send", Send},
		{"receive", Receive},
		{"unread", Unread},
		{"watchEdges", WatchEdges},
		{"waitEdge", WaitEdge},
		{"closeFd", CloseFd},
		{"lock", Lock},
		{"mountBpffs", MountBpffs},
		{"unmount", Unmount},
		{"filesystemType", FilesystemType},
		{"cgroupId", CgroupId},
		{"capabilities", Capabilities},
		{"possibleCpus", PossibleCpus},
		{"openHandles", OpenHandles},
	};
	for (auto& [name, call] : calls) {
		exports.Set(name, Napi::Function::New(env, call, name));
	}
}
