// The classes that src/native.ts declares; what each does is told there.
#pragma once

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <napi.h>

#include <functional>
#include <memory>

#include "handle.h"

class Netlink;

class Map : public Napi::ObjectWrap<Map>, public FdHandle {
 public:
	static Napi::Function Define(Napi::Env env);
	static Napi::Object Wrap(Napi::Env env, int fd, const std::string& subject);
	static Map& From(const Napi::CallbackInfo& info, size_t index, const char* name);
	explicit Map(const Napi::CallbackInfo& info);

	const bpf_map_info& spec() const { return spec_; }

 private:
	Napi::Value Fd(const Napi::CallbackInfo& info);
	Napi::Value Info(const Napi::CallbackInfo& info);
	Napi::Value GetBtf(const Napi::CallbackInfo& info);
	Napi::Value Lookup(const Napi::CallbackInfo& info);
	Napi::Value Update(const Napi::CallbackInfo& info);
	Napi::Value Delete(const Napi::CallbackInfo& info);
	Napi::Value NextKey(const Napi::CallbackInfo& info);
	Napi::Value Entries(const Napi::CallbackInfo& info);
	Napi::Value Count(const Napi::CallbackInfo& info);
	Napi::Value Pin(const Napi::CallbackInfo& info);
	Napi::Value Close(const Napi::CallbackInfo& info);
	size_t LookupSize() const;
	bool CollectBatches(Napi::Env env, std::vector<uint8_t>& keys, std::vector<uint8_t>& values, size_t& count);
	void DropRepeated(std::vector<uint8_t>& keys, std::vector<uint8_t>& values, size_t& count) const;
	void CollectOneByOne(Napi::Env env, std::vector<uint8_t>& keys, std::vector<uint8_t>* values, size_t& count);
	bpf_map_info spec_{};
};

class Program : public Napi::ObjectWrap<Program>, public FdHandle {
 public:
	static Napi::Function Define(Napi::Env env);
	/* `attach_type`: the one the object was compiled with, or -1 where only an fd is known. */
	static Napi::Object Wrap(Napi::Env env, int fd, int attach_type, const std::string& subject);
	static Program& From(const Napi::CallbackInfo& info, size_t index, const char* name);
	explicit Program(const Napi::CallbackInfo& info);

 private:
	Napi::Value Fd(const Napi::CallbackInfo& info);
	Napi::Value Info(const Napi::CallbackInfo& info);
	Napi::Value Pin(const Napi::CallbackInfo& info);
	Napi::Value AttachCgroup(const Napi::CallbackInfo& info);
	Napi::Value AttachNetns(const Napi::CallbackInfo& info);
	Napi::Value AttachMap(const Napi::CallbackInfo& info);
	Napi::Value AttachMapLegacy(const Napi::CallbackInfo& info);
	Napi::Value DetachMap(const Napi::CallbackInfo& info);
	Napi::Value TestRun(const Napi::CallbackInfo& info);
	Napi::Value Close(const Napi::CallbackInfo& info);
	bpf_attach_type AttachType(const Napi::CallbackInfo& info, size_t index);
	Napi::Value CreateLink(Napi::Env env, int target_fd, bpf_attach_type type, const std::string& target);
};

class Link : public Napi::ObjectWrap<Link>, public FdHandle {
 public:
	static Napi::Function Define(Napi::Env env);
	static Napi::Object Wrap(Napi::Env env, int fd, const std::string& subject);
	explicit Link(const Napi::CallbackInfo& info);

 private:
	Napi::Value Fd(const Napi::CallbackInfo& info);
	Napi::Value Info(const Napi::CallbackInfo& info);
	Napi::Value Update(const Napi::CallbackInfo& info);
	Napi::Value Pin(const Napi::CallbackInfo& info);
	Napi::Value Detach(const Napi::CallbackInfo& info);
	Napi::Value Close(const Napi::CallbackInfo& info);
};

class Object : public Napi::ObjectWrap<Object>, public Handle {
 public:
	static Napi::Function Define(Napi::Env env);
	explicit Object(const Napi::CallbackInfo& info);
	~Object() override { CloseOnce(); }

 protected:
	void Release() override;

 private:
	Napi::Value GetBtf(const Napi::CallbackInfo& info);
	Napi::Value Maps(const Napi::CallbackInfo& info);
	Napi::Value Programs(const Napi::CallbackInfo& info);
	Napi::Value Globals(const Napi::CallbackInfo& info);
	Napi::Value SetGlobals(const Napi::CallbackInfo& info);
	Napi::Value SetMaxEntries(const Napi::CallbackInfo& info);
	Napi::Value ReuseMap(const Napi::CallbackInfo& info);
	Napi::Value SetAutoload(const Napi::CallbackInfo& info);
	Napi::Value Load(const Napi::CallbackInfo& info);
	Napi::Value GetMap(const Napi::CallbackInfo& info);
	Napi::Value GetProgram(const Napi::CallbackInfo& info);
	Napi::Value Close(const Napi::CallbackInfo& info);
	bpf_object* Require(Napi::Env env, bool loaded, const char* what);
	bpf_map* FindMap(Napi::Env env, const std::string& name);
	bpf_program* FindProgram(Napi::Env env, const std::string& name);
	bpf_object* object_ = nullptr;
	bool loaded_ = false;
	std::string name_;
};

/* An fd or 0, or a positive errno and the call that gave it: for threads that cannot throw to JS. */
struct Outcome {
	int fd = -1;
	int error = 0;
	const char* syscall = "";

	static Outcome Of(int result, const char* syscall) { return result < 0 ? Outcome{-1, errno, syscall} : Outcome{result, 0, syscall}; }
};

class NetNs : public Napi::ObjectWrap<NetNs>, public FdHandle {
 public:
	static Napi::Function Define(Napi::Env env);
	/* EINVAL if it is not a network namespace. */
	static Napi::Object Wrap(Napi::Env env, int fd, const std::string& subject);
	explicit NetNs(const Napi::CallbackInfo& info);
	~NetNs() override;

 protected:
	void Release() override;

 private:
	Napi::Value Fd(const Napi::CallbackInfo& info);
	Napi::Value Device(const Napi::CallbackInfo& info);
	Napi::Value Inode(const Napi::CallbackInfo& info);
	Napi::Value Cookie(const Napi::CallbackInfo& info);
	Napi::Value Socket(const Napi::CallbackInfo& info);
	Napi::Value Interfaces(const Napi::CallbackInfo& info);
	Napi::Value Addresses(const Napi::CallbackInfo& info);
	Napi::Value Routes(const Napi::CallbackInfo& info);
	Napi::Value LocalRoutes(const Napi::CallbackInfo& info);
	Napi::Value Rules(const Napi::CallbackInfo& info);
	Napi::Value SetUp(const Napi::CallbackInfo& info);
	Napi::Value ChangeRule(const Napi::CallbackInfo& info);
	Napi::Value ChangeLocalRoute(const Napi::CallbackInfo& info);
	Napi::Value ChangeAddress(const Napi::CallbackInfo& info);
	Napi::Value Sysctls(const Napi::CallbackInfo& info);
	Napi::Value SetSysctl(const Napi::CallbackInfo& info);
	Napi::Value RunIterator(const Napi::CallbackInfo& info);
	Napi::Value TestRun(const Napi::CallbackInfo& info);
	Napi::Value DestroyTcpSocket(const Napi::CallbackInfo& info);
	Napi::Value Close(const Napi::CallbackInfo& info);
	/* Runs `act` in the namespace, on a thread of its own; throws what it gives, about `what`. */
	int Inside(Napi::Env env, const std::string& what, const std::function<Outcome()>& act) const;
	int SocketInside(Napi::Env env, int family, int type, int protocol) const;
	/* NETLINK_ROUTE, made at the first call and kept: every other way into the namespace takes a thread. */
	Netlink& Route(Napi::Env env);
	std::unique_ptr<Netlink> route_;
	uint64_t device_ = 0, inode_ = 0;
};

Napi::Function DefineRingBuffer(Napi::Env env);
Napi::Value OpenRingBuffer(const Napi::CallbackInfo& info);
Napi::Value OpenNetns(const Napi::CallbackInfo& info);
Napi::Value NetnsOfSocket(const Napi::CallbackInfo& info);
Napi::Value CreateNetns(const Napi::CallbackInfo& info);
void DefineSeqpacket(Napi::Env env, Napi::Object exports);
void DefineSystem(Napi::Env env, Napi::Object exports);

/* What libbpf says while this lives, on this thread; it never prints. */
class LibbpfLog {
 public:
	LibbpfLog();
	~LibbpfLog();
	const std::string& text() const { return text_; }

 private:
	std::string text_;
};
