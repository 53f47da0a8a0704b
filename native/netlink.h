// Netlink by hand: one request, and everything that the kernel answers to it.
#pragma once

#include <linux/rtnetlink.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

/* A netlink socket that is closed with the scope. */
class Netlink {
 public:
	explicit Netlink(int fd) : fd_(fd) {}
	~Netlink() { close(fd_); }
	Netlink(const Netlink&) = delete;
	Netlink& operator=(const Netlink&) = delete;

	/* For the ioctls that any socket has, SIOCGIFINDEX for one. */
	int fd() const { return fd_; }
	/* An answer may still be on its way to it: nothing more may be asked. */
	bool failed() const { return failed_; }

	/* Sends one request, a dump or one with NLM_F_ACK. Gives 0 or a positive errno; `each` sees every message of the answer. */
	int Ask(nlmsghdr* request, const std::function<void(nlmsghdr*)>& each = [](nlmsghdr*) {}) {
		/* A dump that the kernel changed under way says so, and is asked for again. */
		for (int attempt = 0; attempt < 5; attempt++) {
			std::vector<std::vector<char>> answers;
			request->nlmsg_seq = ++sequence_;
			if (send(fd_, request, request->nlmsg_len, 0) < 0) {
				return Failed(errno);
			}
			int error = Receive(answers);
			if (error == EAGAIN) {
				continue;
			}
			for (auto& answer : answers) {
				each(reinterpret_cast<nlmsghdr*>(answer.data()));
			}
			return error;
		}
		return EAGAIN;
	}

 private:
	int Failed(int error) {
		failed_ = true;
		return error;
	}

	int Receive(std::vector<std::vector<char>>& answers) {
		bool interrupted = false;
		alignas(nlmsghdr) char buffer[65536];
		for (;;) {
			sockaddr_nl sender{};
			socklen_t size = sizeof(sender);
			ssize_t got = recvfrom(fd_, buffer, sizeof(buffer), 0, reinterpret_cast<sockaddr*>(&sender), &size);
			if (got < 0) {
				if (errno == EINTR) {
					continue;
				}
				return Failed(errno);
			}
			/* A pod with CAP_NET_ADMIN may write to this socket too: only the kernel has port 0. */
			if (sender.nl_pid != 0) {
				continue;
			}
			int left = static_cast<int>(got);
			for (nlmsghdr* message = reinterpret_cast<nlmsghdr*>(buffer); NLMSG_OK(message, static_cast<unsigned>(left)); message = NLMSG_NEXT(message, left)) {
				interrupted |= (message->nlmsg_flags & NLM_F_DUMP_INTR) != 0;
				if (message->nlmsg_type == NLMSG_DONE) {
					/* A dump that failed half way ends with its errno here. */
					int result = message->nlmsg_len >= NLMSG_LENGTH(sizeof(int)) ? *static_cast<int*>(NLMSG_DATA(message)) : 0;
					return result < 0 ? -result : interrupted ? EAGAIN : 0;
				}
				if (message->nlmsg_type == NLMSG_ERROR) {
					return -static_cast<nlmsgerr*>(NLMSG_DATA(message))->error;
				}
				char* start = reinterpret_cast<char*>(message);
				answers.emplace_back(start, start + message->nlmsg_len);
			}
		}
	}

	int fd_;
	uint32_t sequence_ = 0;
	bool failed_ = false;
};

template <typename Body>
struct Request {
	nlmsghdr header{};
	Body body{};

	Request(uint16_t type, uint16_t flags) {
		header.nlmsg_len = NLMSG_LENGTH(sizeof(Body));
		header.nlmsg_type = type;
		header.nlmsg_flags = static_cast<uint16_t>(NLM_F_REQUEST | flags);
	}

	/* At most 16 bytes each and six of them: nothing that is asked here needs more. */
	void Add(uint16_t type, const void* data, size_t size) {
		auto* attribute = reinterpret_cast<rtattr*>(reinterpret_cast<char*>(this) + NLMSG_ALIGN(header.nlmsg_len));
		attribute->rta_type = type;
		attribute->rta_len = static_cast<uint16_t>(RTA_LENGTH(size));
		memcpy(RTA_DATA(attribute), data, size);
		header.nlmsg_len = static_cast<uint32_t>(NLMSG_ALIGN(header.nlmsg_len) + RTA_ALIGN(attribute->rta_len));
	}
	void Add(uint16_t type, uint32_t number) { Add(type, &number, sizeof(number)); }

 private:
	static_assert(sizeof(Body) % NLMSG_ALIGNTO == 0, "attributes follow the body without a hole");
	alignas(NLMSG_ALIGNTO) char attributes_[6 * RTA_SPACE(16)] = {};
};

using Attributes = std::map<int, rtattr*>;

template <typename Body>
Attributes AttributesOf(nlmsghdr* message) {
	Attributes found;
	int left = static_cast<int>(message->nlmsg_len - NLMSG_LENGTH(sizeof(Body)));
	auto* attribute = reinterpret_cast<rtattr*>(static_cast<char*>(NLMSG_DATA(message)) + NLMSG_ALIGN(sizeof(Body)));
	for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) {
		found[attribute->rta_type & NLA_TYPE_MASK] = attribute;
	}
	return found;
}

inline uint32_t NumberOr(const Attributes& attributes, int type, uint32_t otherwise) {
	auto found = attributes.find(type);
	return found == attributes.end() ? otherwise : *static_cast<uint32_t*>(RTA_DATA(found->second));
}
