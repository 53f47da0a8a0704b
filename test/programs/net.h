/* Addresses as text, errors by name: shared by the tests' helper programs. */
#ifndef NET_H
#define NET_H

#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define SO_ORIGINAL_DST 80
#define TEXT_MAX 96

union address {
	struct sockaddr any;
	struct sockaddr_in in;
	struct sockaddr_in6 in6;
	struct sockaddr_storage storage;
};

static inline void misuse(const char *what)
{
	fprintf(stderr, "misuse: %s\n", what);
	exit(2);
}

static inline const char *errno_name(int error)
{
	const char *name = strerrorname_np(error);

	return name ? name : "EUNKNOWN";
}

static inline socklen_t address_size(const union address *address)
{
	return address->any.sa_family == AF_INET ? sizeof(address->in) : sizeof(address->in6);
}

/* 10.0.0.1:80, [fd00::1]:80, [::ffff:10.0.0.1]:80, [fe80::1%eth0]:80 */
static inline union address parse_address(const char *text)
{
	union address address = {0};
	char host[TEXT_MAX], *zone;
	const char *colon = strrchr(text, ':');
	size_t length;

	if (!colon || (size_t)(colon - text) >= sizeof(host))
		misuse(text);
	length = colon - text;
	memcpy(host, text, length);
	host[length] = 0;
	if (host[0] == '[') {
		host[length - 1] = 0;
		zone = strchr(host, '%');
		if (zone) {
			*zone = 0;
			address.in6.sin6_scope_id = if_nametoindex(zone + 1);
		}
		address.in6.sin6_family = AF_INET6;
		address.in6.sin6_port = htons(atoi(colon + 1));
		if (inet_pton(AF_INET6, host + 1, &address.in6.sin6_addr) != 1)
			misuse(text);
	} else {
		address.in.sin_family = AF_INET;
		address.in.sin_port = htons(atoi(colon + 1));
		if (inet_pton(AF_INET, host, &address.in.sin_addr) != 1)
			misuse(text);
	}
	return address;
}

static inline const char *format_address(const union address *address, char *text)
{
	char host[INET6_ADDRSTRLEN];

	if (address->any.sa_family == AF_INET)
		snprintf(text, TEXT_MAX, "%s:%d", inet_ntop(AF_INET, &address->in.sin_addr, host, sizeof(host)), ntohs(address->in.sin_port));
	else
		snprintf(text, TEXT_MAX, "[%s]:%d", inet_ntop(AF_INET6, &address->in6.sin6_addr, host, sizeof(host)), ntohs(address->in6.sin6_port));
	return text;
}

/* The address as JSON text, or the error's name. */
static inline const char *name_of(int fd, int (*call)(int, struct sockaddr *, socklen_t *), char *text)
{
	union address address = {0};
	socklen_t size = sizeof(address);

	if (call(fd, &address.any, &size))
		snprintf(text, TEXT_MAX, "%s", errno_name(errno));
	else
		format_address(&address, text);
	return text;
}

static inline const char *original_dst_of(int fd, int level, char *text)
{
	union address address = {0};
	socklen_t size = level == SOL_IP ? sizeof(address.in) : sizeof(address.in6);

	if (getsockopt(fd, level, SO_ORIGINAL_DST, &address, &size))
		snprintf(text, TEXT_MAX, "%s", errno_name(errno));
	else
		format_address(&address, text);
	return text;
}

static inline void prepare_process(void)
{
	struct rlimit limit;

	signal(SIGPIPE, SIG_IGN);
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!getrlimit(RLIMIT_NOFILE, &limit)) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
}

/* A socket bound there; -1: errno. `prepare`, if any, sets options before the bind. */
static inline int try_socket_at(const char *text, int type, void (*prepare)(int fd))
{
	union address address = parse_address(text);
	int fd = socket(address.any.sa_family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;

	if (fd < 0) {
		perror("socket");
		exit(1);
	}
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (address.any.sa_family == AF_INET6) {
		on = !IN6_IS_ADDR_UNSPECIFIED(&address.in6.sin6_addr);
		setsockopt(fd, SOL_IPV6, IPV6_V6ONLY, &on, sizeof(on));
	}
	if (prepare)
		prepare(fd);
	if (bind(fd, &address.any, address_size(&address))) {
		int error = errno;

		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

static inline int try_listen_at(const char *text, void (*prepare)(int fd))
{
	int fd = try_socket_at(text, SOCK_STREAM, prepare), fastopen = 64;

	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_TCP, TCP_FASTOPEN, &fastopen, sizeof(fastopen));
	if (listen(fd, 4096)) {
		int error = errno;

		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

static inline int or_exit(int fd, const char *text)
{
	if (fd < 0) {
		perror(text);
		exit(1);
	}
	return fd;
}

static inline int socket_at(const char *text, int type, void (*prepare)(int fd))
{
	return or_exit(try_socket_at(text, type, prepare), text);
}

static inline int listen_at(const char *text)
{
	return or_exit(try_listen_at(text, NULL), text);
}

/* ::ffff:a.b.c.d as a.b.c.d; any other address as it is. */
static inline union address unmapped(union address address)
{
	union address plain = {0};

	if (address.any.sa_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&address.in6.sin6_addr))
		return address;
	plain.in.sin_family = AF_INET;
	plain.in.sin_port = address.in6.sin6_port;
	memcpy(&plain.in.sin_addr, &address.in6.sin6_addr.s6_addr[12], 4);
	return plain;
}

/* a.b.c.d as ::ffff:a.b.c.d */
static inline union address mapped(union address address)
{
	union address six = {0};

	six.in6.sin6_family = AF_INET6;
	six.in6.sin6_port = address.in.sin_port;
	six.in6.sin6_addr.s6_addr[10] = six.in6.sin6_addr.s6_addr[11] = 0xff;
	memcpy(&six.in6.sin6_addr.s6_addr[12], &address.in.sin_addr, 4);
	return six;
}

#endif
