#include <arpa/inet.h>
#include <linux/inet_diag.h>
#include <linux/sock_diag.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include "arguments.h"
#include "classes.h"
#include "netlink.h"

/* inet_diag_msg.idiag_timer of what is left of a connection in TIME_WAIT or late FIN_WAIT2: no socket is behind it any more. */
static constexpr uint8_t kTimeWaitTimer = 3;

Napi::Value NetNs::RunIterator(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Program& program = Program::From(info, 0, "program");
	int own = program.fd(env);
	bpf_iter_link_info target = {};
	LIBBPF_OPTS(bpf_link_create_opts, opts);
	if (!info[1].IsUndefined()) {
		target.map.map_fd = Map::From(info, 1, "map").fd(env);
		opts.iter_info = &target;
		opts.iter_info_len = sizeof(target);
	}
	OwnedFd link{Checked(env, "bpf(BPF_LINK_CREATE)", program.subject(), [&] { return bpf_link_create(own, 0, BPF_TRACE_ITER, &opts); })};
	std::vector<uint8_t> written;
	Inside(env, program.subject(), [&] {
		/* Of whoever creates it: the namespace is taken here, not at the first read. */
		Outcome created = Outcome::Of(bpf_iter_create(link.fd), "bpf(BPF_ITER_CREATE)");
		if (created.error) {
			return created;
		}
		OwnedFd iterator{created.fd};
		std::vector<uint8_t> chunk(65536);
		for (;;) {
			ssize_t got = read(iterator.fd, chunk.data(), chunk.size());
			/* EAGAIN: a million sockets in a row for which the program wrote nothing; the next read goes on behind them. */
			if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
				continue;
			}
			if (got <= 0) {
				return Outcome::Of(static_cast<int>(got), "read");
			}
			written.insert(written.end(), chunk.data(), chunk.data() + got);
		}
	});
	return CopyBytes(env, written.data(), written.size());
}

Napi::Value NetNs::TestRun(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Program& program = Program::From(info, 0, "program");
	int own = program.fd(env);
	Bytes data = BytesArgument(info, 1, "data");
	std::vector<uint8_t> packet(data.data, data.data + data.size), answer(data.size);
	LIBBPF_OPTS(bpf_test_run_opts, opts);
	opts.data_in = packet.data();
	opts.data_size_in = static_cast<uint32_t>(packet.size());
	opts.data_out = answer.data();
	opts.data_size_out = static_cast<uint32_t>(answer.size());
	Inside(env, program.subject(), [&] {
		/* libbpf 1 gives the negative errno, and sets errno too. */
		return Outcome::Of(bpf_prog_test_run_opts(own, &opts), "bpf(BPF_PROG_TEST_RUN)");
	});
	Napi::Object result = Napi::Object::New(env);
	result.Set("returnValue", opts.retval);
	result.Set("data", CopyBytes(env, answer.data(), opts.data_size_out));
	return result;
}

namespace {

struct Endpoint {
	IpAddress address;
	uint16_t port;

	static Endpoint Argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
		Napi::Object object = ObjectArgument(info, index, name);
		IpAddress address = IpAddress::Of(info.Env(), object.Get("address"));
		return {address, static_cast<uint16_t>(IntegerOf(info.Env(), object.Get("port"), "port", 0, UINT16_MAX))};
	}

	std::string Text() const { return address.size == 4 ? address.Text() + ":" + std::to_string(port) : "[" + address.Text() + "]:" + std::to_string(port); }
};

Request<inet_diag_req_v2> TcpRequest(uint16_t type, uint16_t flags, uint8_t family) {
	Request<inet_diag_req_v2> request(type, flags);
	request.body.sdiag_family = family;
	request.body.sdiag_protocol = IPPROTO_TCP;
	return request;
}

/* A kernel without tcp_diag says ENOENT to everything, as for a socket that is not there; to a dump of nothing only the former does. */
bool HasTcpDiag(Netlink& netlink, uint8_t family) {
	auto nothing = TcpRequest(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family);
	return netlink.Ask(&nothing.header) != ENOENT;
}

}  // namespace

Napi::Value NetNs::DestroyTcpSocket(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Endpoint local = Endpoint::Argument(info, 0, "local");
	Endpoint remote = Endpoint::Argument(info, 1, "remote");
	if (local.address.size != remote.address.size) {
		throw Napi::RangeError::New(env, "Expected both addresses to have the same size");
	}
	uint32_t interface_index = info[2].IsUndefined() ? 0 : static_cast<uint32_t>(IntegerArgument(info, 2, "interfaceIndex", 0, INT32_MAX));
	std::string subject = "TCP " + local.Text() + " to " + remote.Text();

	uint8_t family = local.address.family();
	auto find = TcpRequest(SOCK_DIAG_BY_FAMILY, NLM_F_ACK, family);
	inet_diag_sockid& id = find.body.id;
	id.idiag_sport = htons(local.port);
	id.idiag_dport = htons(remote.port);
	memcpy(id.idiag_src, local.address.bytes, local.address.size);
	memcpy(id.idiag_dst, remote.address.bytes, remote.address.size);
	id.idiag_if = interface_index;
	id.idiag_cookie[0] = id.idiag_cookie[1] = INET_DIAG_NOCOOKIE;

	Netlink netlink(SocketInside(env, AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG));
	inet_diag_msg found{};
	int error = netlink.Ask(&find.header, [&](nlmsghdr* message) { memcpy(&found, NLMSG_DATA(message), sizeof(found)); });
	if (error == ENOENT && !HasTcpDiag(netlink, family)) {
		ThrowErrno(env, EOPNOTSUPP, "netlink(SOCK_DIAG_BY_FAMILY)", subject);
	}
	/* Where there is no such connection the kernel finds the listener that one would come to; SOCK_DESTROY would end that. */
	if (error == ENOENT || found.idiag_state == TCP_LISTEN || found.idiag_timer == kTimeWaitTimer) {
		return Napi::Boolean::New(env, false);
	}
	CheckErrno(env, -error, error, "netlink(SOCK_DIAG_BY_FAMILY)", subject);

	/* By its cookie, so that nothing else that has taken its place meanwhile. */
	auto destroy = TcpRequest(SOCK_DESTROY, NLM_F_ACK, family);
	destroy.body.id = id;
	memcpy(destroy.body.id.idiag_cookie, found.id.idiag_cookie, sizeof(found.id.idiag_cookie));
	error = netlink.Ask(&destroy.header);
	if (error != ENOENT) {
		CheckErrno(env, -error, error, "netlink(SOCK_DESTROY)", subject);
	}
	return Napi::Boolean::New(env, error == 0);
}
