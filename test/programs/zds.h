/* ztunnel's side of ZDS, by hand: protobuf package istio.workload.zds, one message a SEQPACKET packet. */
#ifndef ZDS_H
#define ZDS_H

#include <fcntl.h>
#include <sys/un.h>

#include "net.h"

/* As ztunnel's buffer. */
#define ZDS_PACKET_MAX 1024
#define ZDS_TEXT_MAX 512

/* Field numbers of WorkloadRequest. */
enum zds_kind { ZDS_ADD = 1, ZDS_DELETE = 2, ZDS_SNAPSHOT_SENT = 3, ZDS_KEEP = 5 };

struct zds_request {
	enum zds_kind kind;
	char uid[ZDS_TEXT_MAX], name[ZDS_TEXT_MAX], namespace[ZDS_TEXT_MAX], service_account[ZDS_TEXT_MAX];
	int netns;
};

struct span {
	const uint8_t *at, *end;
};

static inline void zds_malformed(const char *what)
{
	fprintf(stderr, "malformed request: %s\n", what);
	exit(4);
}

static inline uint64_t zds_varint(struct span *from)
{
	uint64_t value = 0;

	for (int shift = 0; shift < 64 && from->at < from->end; shift += 7) {
		uint8_t byte = *from->at++;

		value |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80))
			return value;
	}
	zds_malformed("varint");
	return 0;
}

/* The number of the next field, all of which are length-delimited; 0 at the end. */
static inline int zds_field(struct span *message, struct span *content)
{
	uint64_t tag, size;

	if (message->at == message->end)
		return 0;
	tag = zds_varint(message);
	if ((tag & 7) != 2 || tag >> 3 == 0 || tag >> 3 > 100)
		zds_malformed("tag");
	size = zds_varint(message);
	if (size > (uint64_t)(message->end - message->at))
		zds_malformed("length");
	*content = (struct span){message->at, message->at + size};
	message->at += size;
	return tag >> 3;
}

static inline void zds_text(struct span content, char *text)
{
	size_t size = content.end - content.at;

	if (size >= ZDS_TEXT_MAX)
		zds_malformed("text");
	memcpy(text, content.at, size);
	text[size] = 0;
}

static inline void zds_decode(struct span packet, struct zds_request *request)
{
	struct span payload, content, info;
	int number;

	memset(request, 0, sizeof(*request));
	request->kind = zds_field(&packet, &payload);
	if (packet.at != packet.end)
		zds_malformed("more than one payload");
	while ((number = zds_field(&payload, &content))) {
		if (number == 1 && (request->kind == ZDS_ADD || request->kind == ZDS_KEEP)) {
			zds_text(content, request->uid);
		} else if (number == 2 && request->kind == ZDS_DELETE) {
			zds_text(content, request->uid);
		} else if (number == 2 && request->kind == ZDS_ADD) {
			info = content;
			while ((number = zds_field(&info, &content))) {
				if (number > 3)
					zds_malformed("WorkloadInfo");
				zds_text(content, number == 1 ? request->name : number == 2 ? request->namespace : request->service_account);
			}
		} else {
			zds_malformed("payload");
		}
	}
	if (!request->uid[0] != (request->kind == ZDS_SNAPSHOT_SENT))
		zds_malformed("uid");
}

/* 1: a request; 0: the end; -1: errno. Ends the process for what is no request, and for an fd that is missing or that nobody asked for. */
static inline int zds_receive(int fd, struct zds_request *request)
{
	uint8_t bytes[ZDS_PACKET_MAX];
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec part = {bytes, sizeof(bytes)};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	ssize_t got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
	struct cmsghdr *header;

	if (got <= 0)
		return got;
	if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
		zds_malformed("truncated");
	zds_decode((struct span){bytes, bytes + got}, request);
	header = CMSG_FIRSTHDR(&message);
	request->netns = -1;
	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(&request->netns, CMSG_DATA(header), sizeof(int));
	if ((request->kind == ZDS_ADD) != (request->netns >= 0))
		zds_malformed("fd");
	return 1;
}

/* -1: errno. The hello is sent. */
static inline int zds_connect(const char *path)
{
	static const uint8_t hello[] = {0x08, 0x01};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	if (!connect(fd, (struct sockaddr *)&address, sizeof(address)) && send(fd, hello, sizeof(hello), MSG_NOSIGNAL) == sizeof(hello))
		return fd;
	close(fd);
	return -1;
}

/* `error` of at most 100 bytes, empty for success. */
static inline void zds_answer(int fd, const char *error)
{
	uint8_t packet[128];
	size_t size = strlen(error), at = 0;

	packet[at++] = 0x0a;
	packet[at++] = size ? size + 2 : 0;
	if (size) {
		packet[at++] = 0x0a;
		packet[at++] = size;
		memcpy(packet + at, error, size);
	}
	send(fd, packet, at + size, MSG_NOSIGNAL);
}

/* An Ack with an fd, which nobody asked for. */
static inline void zds_answer_with_fd(int fd)
{
	uint8_t ack[] = {0x0a, 0x00};
	struct iovec part = {ack, sizeof(ack)};
	char control[CMSG_SPACE(sizeof(int))] = {0};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	sendmsg(fd, &message, MSG_NOSIGNAL);
}

#endif
