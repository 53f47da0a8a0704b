/* DNS messages, as much as a test needs: one TXT question, one TXT answer. */
#ifndef DNS_H
#define DNS_H

#include "net.h"

#define DNS_MAX 512
#define DNS_HEADER 12
#define DNS_TXT 16
#define DNS_IN 1

static inline void put16(uint8_t *at, uint16_t value)
{
	at[0] = value >> 8;
	at[1] = value;
}

static inline uint16_t get16(const uint8_t *at)
{
	return at[0] << 8 | at[1];
}

/* Returns the query's length. */
static inline size_t dns_query(uint8_t *query, uint16_t id)
{
	static const uint8_t name[] = "\4test\7example";
	uint8_t *at = query + DNS_HEADER;

	memset(query, 0, DNS_HEADER);
	put16(query, id);
	query[2] = 1; /* recursion desired */
	put16(query + 4, 1);
	memcpy(at, name, sizeof(name));
	at += sizeof(name);
	put16(at, DNS_TXT);
	put16(at + 2, DNS_IN);
	return at + 4 - query;
}

/* The question again, and `text` (of at most 255 bytes) as its answer. Returns the answer's length, 0 for what is no query. */
static inline size_t dns_answer(uint8_t *answer, const uint8_t *query, size_t size, const char *text)
{
	size_t length = strlen(text);
	uint8_t *at = answer + size;

	if (size < DNS_HEADER || size + 13 + length > DNS_MAX || query[2] & 0x80)
		return 0;
	memcpy(answer, query, size);
	answer[2] |= 0x80;
	put16(answer + 6, 1);
	memset(at, 0, 12);
	put16(at, 0xc000 | DNS_HEADER); /* the question's name */
	put16(at + 2, DNS_TXT);
	put16(at + 4, DNS_IN);
	put16(at + 10, length + 1);
	at[12] = length;
	memcpy(at + 13, text, length);
	return size + 13 + length;
}

/* The text of an answer to `dns_query`; false when it is none. */
static inline bool dns_text(const uint8_t *answer, size_t size, char *text)
{
	uint8_t query[DNS_MAX];
	size_t at = dns_query(query, 0) + 13;

	if (size < at || !(answer[2] & 0x80) || get16(answer + 6) != 1 || size != at + answer[at - 1])
		return false;
	memcpy(text, answer + at, size - at);
	text[size - at] = 0;
	return true;
}

/* Answers one datagram with `{"server":SERVER,"peer":PEER}`; false when none is waiting. */
static inline bool dns_serve_datagram(int fd, const char *server, char *peer)
{
	uint8_t query[DNS_MAX], answer[DNS_MAX];
	char text[256];
	union address from = {0};
	socklen_t from_size = sizeof(from);
	ssize_t size = recvfrom(fd, query, sizeof(query), 0, &from.any, &from_size);

	if (size < 0)
		return false;
	format_address(&from, peer);
	snprintf(text, sizeof(text), "{\"server\":\"%s\",\"peer\":\"%s\"}", server, peer);
	sendto(fd, answer, dns_answer(answer, query, size, text), 0, &from.any, from_size);
	return true;
}

/* The same over an accepted connection, one query that comes in one piece. */
static inline void dns_serve_stream(int fd, const char *server, const char *peer)
{
	uint8_t query[2 + DNS_MAX], answer[2 + DNS_MAX];
	char text[256];
	ssize_t size = recv(fd, query, sizeof(query), 0);
	size_t length = 0;

	snprintf(text, sizeof(text), "{\"server\":\"%s\",\"peer\":\"%s\"}", server, peer);
	if (size > 2 && get16(query) == size - 2)
		length = dns_answer(answer + 2, query + 2, size - 2, text);
	if (length > 0) {
		put16(answer, length);
		send(fd, answer, 2 + length, 0);
	}
}

#endif
