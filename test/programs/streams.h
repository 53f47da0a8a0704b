/* What one stream of streams.c is: its bytes, and the plan of both ends. All of it follows from (seed, index), so that one stream can be run again alone. */
#ifndef STREAMS_H
#define STREAMS_H

#include "net.h"

enum side { CLIENT, SERVER };

struct random {
	uint64_t state;
};

static inline uint64_t mix(uint64_t value)
{
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
	value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
	return value ^ (value >> 31);
}

static inline uint64_t draw(struct random *random)
{
	return mix(random->state += 0x9e3779b97f4a7c15);
}

static inline uint64_t draw_between(struct random *random, uint64_t least, uint64_t most)
{
	return least + draw(random) % (most - least + 1);
}

static inline bool chance(struct random *random, unsigned int percent)
{
	return draw(random) % 100 < percent;
}

/* 1 to `most`, each power of two as likely as the next. */
static inline uint64_t draw_log(struct random *random, uint64_t most)
{
	uint64_t least = 1ull << draw_between(random, 0, 63 - __builtin_clzll(most));

	return draw_between(random, least, 2 * least - 1 < most ? 2 * least - 1 : most);
}

static inline uint64_t content_key(uint64_t seed, uint64_t index, enum side sender)
{
	return mix(seed ^ mix(2 * index + sender + 1));
}

/* The bytes of a direction from `offset` on: no two places of any two streams look alike. */
static inline void fill_content(char *bytes, uint64_t key, uint64_t offset, size_t size)
{
	uint64_t word = mix(key + offset / 8 * 0x9e3779b97f4a7c15);
	size_t at = 0, skip = offset % 8;

	while (at < size) {
		size_t part = 8 - skip < size - at ? 8 - skip : size - at;

		memcpy(bytes + at, (char *)&word + skip, part);
		at += part;
		skip = 0;
		word = mix(key + (offset + at) / 8 * 0x9e3779b97f4a7c15);
	}
}

/* @return the first byte that differs, or `size` */
static inline size_t first_wrong(const char *bytes, uint64_t key, uint64_t offset, size_t size)
{
	char right[4096];

	for (size_t at = 0; at < size; at += sizeof(right)) {
		size_t part = size - at < sizeof(right) ? size - at : sizeof(right);

		fill_content(right, key, offset + at, part);
		if (!memcmp(bytes + at, right, part))
			continue;
		while (bytes[at] == right[at % sizeof(right)])
			at++;
		return at;
	}
	return size;
}

/* Where in a direction of `total` bytes the first eight of these come from; -1: nowhere. */
static inline int64_t find_content(const char *bytes, size_t size, uint64_t key, uint64_t total)
{
	static __thread char window[65536 + 64];

	if (size < 8)
		return -1;
	for (uint64_t offset = 0; offset < total; offset += 65536) {
		uint64_t part = total - offset < sizeof(window) ? total - offset : sizeof(window);
		char *found;

		fill_content(window, key, offset, part);
		found = memmem(window, part, bytes, 8);
		if (found)
			return offset + (found - window);
	}
	return -1;
}

/* EPOLLIN level-triggered; edge-triggered until EAGAIN; edge-triggered until a read or write is short, as tokio does and epoll(7) allows. */
enum reader { READ_LEVEL, READ_DRAIN, READ_UNTIL_SHORT, READERS };

enum ending {
	END_SHUTDOWN,        /* both shut down when they have sent all, and close at EOF */
	END_CLIENT_CLOSES,   /* at once when it has sent and received all */
	END_SERVER_CLOSES,
	END_CLIENT_RESETS,   /* when both have all */
	END_SERVER_RESETS,
	ENDINGS
};

enum fast_open { FAST_OPEN_NONE, FAST_OPEN_SENDTO, FAST_OPEN_CONNECT };

/* Readers that pause for longer have stopped. */
enum { STOP_MS = 20 };

enum { STEPS_MAX = 1024, PIECE_MAX = 256 * 1024, SENDFILE_MAX = 4 << 20 };

/* Once `received` bytes have come, the end may send up to `send_until`. */
struct step {
	uint64_t received, send_until;
};

struct end_plan {
	struct step steps[STEPS_MAX];
	int step_count;
	uint64_t total;                    /* to send */
	bool blocking;
	enum reader reader;
	uint32_t read_max, write_max;
	bool fixed_sizes;                  /* each read and write asks for the most */
	bool peeks, vectors, sendfile, no_delay, more;
	uint32_t receive_buffer, send_buffer; /* 0: the kernel's own */
	uint64_t read_pause_every, write_pause_every; /* bytes; 0: never */
	uint32_t read_pause_ms, write_pause_ms;
};

struct plan {
	struct end_plan ends[2];
	uint32_t destination;              /* which of --to */
	bool mapped;                       /* an IPv4 destination is called from an IPv6 socket */
	bool dual_stack;                   /* the listener is [::] for IPv4 too */
	bool defer_accept, fixed_source, half_close, server_first, chatty;
	uint32_t accept_delay_ms;
	enum fast_open fast_open;
	enum ending ending;
};

static inline void add_step(struct end_plan *plan, uint64_t received, uint64_t bytes)
{
	int count = plan->step_count;

	if (!bytes)
		return;
	plan->total += bytes;
	if (count > 0 && (received <= plan->steps[count - 1].received || count == STEPS_MAX))
		plan->steps[count - 1].send_until = plan->total;
	else
		plan->steps[plan->step_count++] = (struct step){received, plan->total};
}

static inline void plan_exchanges(struct random *random, struct plan *plan, enum side asks)
{
	struct end_plan *client = &plan->ends[asks], *server = &plan->ends[!asks];
	uint64_t request_max = draw_log(random, 2048), response_max = draw_log(random, 8192);

	for (int count = draw_between(random, 4, 120); count > 0; count--) {
		add_step(client, server->total, draw_between(random, 1, request_max));
		add_step(server, client->total, draw_between(random, 1, response_max));
	}
}

/* Both directions at once, or the answer after the question; each may be empty. */
static inline void plan_bulk(struct random *random, struct plan *plan, uint64_t most)
{
	struct end_plan *client = &plan->ends[CLIENT], *server = &plan->ends[SERVER];
	uint64_t there = chance(random, 80) ? draw_log(random, most) : 0, back = chance(random, 80) ? draw_log(random, most) : 0;
	uint64_t before = client->total, received = chance(random, 50) ? server->total : 0;

	add_step(client, received, there);
	add_step(server, chance(random, 30) ? client->total : chance(random, 50) ? before : 0, back);
}

/* What takes `pieces` steps at most, as far as a buffer holds it. */
static inline uint32_t piece_of(uint64_t total, uint32_t pieces)
{
	return total / pieces < PIECE_MAX ? total / pieces + 1 : PIECE_MAX;
}

static inline void plan_end(struct random *random, struct end_plan *plan, uint64_t incoming, bool chatty)
{
	static const uint32_t buffers[] = {4096, 16384, 65536, 1 << 20, 8 << 20};
	/* A receive buffer full of tiny segments drops some, and what follows waits for timers. */
	uint32_t least_read = piece_of(incoming, 1000), least_write = piece_of(plan->total, 500);

	plan->blocking = chance(random, 10);
	plan->reader = draw_between(random, 0, READERS - 1);
	plan->read_max = draw_log(random, PIECE_MAX);
	plan->write_max = draw_log(random, PIECE_MAX);
	if (plan->read_max < least_read)
		plan->read_max = least_read;
	if (plan->write_max < least_write)
		plan->write_max = least_write;
	plan->fixed_sizes = chance(random, 50);
	/* A message in several pieces waits for Nagle and a delayed acknowledgement in a proxy that does not switch them off. */
	if (chatty && chance(random, 70)) {
		plan->fixed_sizes = true;
		if (plan->write_max < 8192)
			plan->write_max = 8192;
	}
	plan->peeks = chance(random, 20);
	plan->vectors = chance(random, 20);
	plan->sendfile = plan->total <= SENDFILE_MAX && chance(random, 15);
	/* Nagle and a delayed acknowledgement would make each exchange last 40 ms. */
	plan->no_delay = chatty || chance(random, 50);
	plan->more = chance(random, 10);
	if (chance(random, 40))
		plan->receive_buffer = buffers[draw_between(random, 0, 4)];
	if (chance(random, 40))
		plan->send_buffer = buffers[draw_between(random, 0, 4)];
	/* A window of less than a loopback segment moves at the pace of timers. */
	if (plan->receive_buffer < 1 << 20 && incoming > 1 << 16)
		plan->receive_buffer = plan->receive_buffer ? 1 << 18 : 0;
	if (plan->send_buffer < 1 << 20 && plan->total > 1 << 20)
		plan->send_buffer = plan->send_buffer ? 1 << 16 : 0;
	/* Slow, or stopping for a while. */
	if (chance(random, 20)) {
		plan->read_pause_every = incoming / draw_between(random, 5, 40) + 1;
		plan->read_pause_ms = draw_between(random, 1, 5);
	} else if (chance(random, 25)) {
		plan->read_pause_every = incoming / draw_between(random, 2, 4) + 1;
		plan->read_pause_ms = draw_between(random, STOP_MS, 150);
	}
	if (chance(random, 25)) {
		plan->write_pause_every = plan->total / draw_between(random, 2, 20) + 1;
		plan->write_pause_ms = draw_between(random, 1, 20);
	}
}

/* @param fixed_source - the stream's tuple is that of the one before in its lane, so it has to go without TIME_WAIT. */
static inline void draw_plan(struct plan *plan, uint64_t seed, uint64_t index, uint64_t max_bytes, uint32_t destinations, bool fixed_source)
{
	struct random random = {mix(seed) ^ mix(~index)};
	struct end_plan *client = &plan->ends[CLIENT], *server = &plan->ends[SERVER];
	/* Half of the streams are small. */
	uint64_t most = chance(&random, 50) || max_bytes < 1 << 16 ? max_bytes : 1 << 16;

	memset(plan, 0, sizeof(*plan));
	plan->destination = draw_between(&random, 0, destinations - 1);
	plan->mapped = chance(&random, 25);
	plan->dual_stack = chance(&random, 50);
	plan->fixed_source = fixed_source;
	plan->ending = fixed_source ? END_CLIENT_RESETS : chance(&random, 50) ? END_SHUTDOWN : draw_between(&random, 0, ENDINGS - 1);
	plan->chatty = chance(&random, 60);
	plan->server_first = chance(&random, 35);
	if (plan->server_first)
		add_step(server, 0, draw_log(&random, 4096));
	else if (chance(&random, 50))
		add_step(client, 0, draw_log(&random, 4096));
	if (plan->chatty) {
		for (int phase = draw_between(&random, 1, 4); phase > 0; phase--) {
			plan_exchanges(&random, plan, plan->server_first || chance(&random, 30) ? SERVER : CLIENT);
			plan_bulk(&random, plan, most / 2 + 1);
		}
	} else {
		plan_bulk(&random, plan, most);
	}
	/* The client says something in any case, and where it is not first, the server has spoken. */
	add_step(client, server->total > 0 ? 1 : 0, 1);
	plan->half_close = plan->ending == END_SHUTDOWN && chance(&random, 30);
	if (plan->half_close)
		add_step(server, client->total, draw_log(&random, most));
	/* Either client-first is certain, or the server would wait for the accept that waits for the client. */
	if (client->steps[0].received == 0) {
		plan->defer_accept = chance(&random, 30);
		plan->fast_open = chance(&random, 30) ? draw_between(&random, FAST_OPEN_SENDTO, FAST_OPEN_CONNECT) : FAST_OPEN_NONE;
	}
	if (chance(&random, 20))
		plan->accept_delay_ms = draw_between(&random, 1, 50);
	plan_end(&random, client, server->total, plan->chatty);
	plan_end(&random, server, client->total, plan->chatty);
	if (plan->fast_open)
		client->blocking = false;
}

/* Over a plan that was drawn: exchanges, so that it shows itself chatty, and then `bytes` each way. */
static inline void plan_duplex(struct plan *plan, uint64_t bytes)
{
	struct end_plan *client = &plan->ends[CLIENT], *server = &plan->ends[SERVER];
	uint64_t exchanged;

	memset(plan, 0, sizeof(*plan));
	plan->chatty = true;
	for (int count = 0; count < 100; count++) {
		add_step(client, server->total, 64);
		add_step(server, client->total, 64);
	}
	exchanged = client->total;
	add_step(client, server->total, bytes);
	add_step(server, exchanged + 1, bytes);
	for (enum side side = CLIENT; side <= SERVER; side++) {
		plan->ends[side].blocking = side == CLIENT;
		plan->ends[side].read_max = plan->ends[side].write_max = 32768;
		plan->ends[side].no_delay = true;
	}
}

#endif
