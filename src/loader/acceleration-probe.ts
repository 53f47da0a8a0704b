/**
Whether this kernel can be trusted with bytes that go past the TCP stack. Found out by use, as versions do not tell: the faults came and went in stable
releases. Real connections in a network namespace made for it, this build's own programs with maps of their own, some hundred milliseconds.
*/
import {reasonOf, hasErrno} from '../errors.js';
import type {MapName, Maps, Schema} from '../maps/schema.js';
import {MAP_NAMES, POD_ACCELERATE, PREFIX_LOCAL, sumTraffic} from '../maps/schema.js';
import {native, type BpfMap, type BpfProgram, type NetNs} from '../native.js';
import type {ProgramName} from './datapath.js';
import {ownCgroup} from './host.js';
import {openObject} from './object.js';
import {joinPair} from './pairs.js';

export interface AccelerationFinding {
	readonly name: string;
	readonly failure: string | undefined;
}

export interface AccelerationTrust {
	/** Whether bytes that come by TCP have to be put behind the redirected ones (the program one_queue); undefined: neither way can be trusted. */
	readonly oneQueue: boolean | undefined;
	/** Of the way that is used, or of the last one tried. */
	readonly findings: readonly AccelerationFinding[];
}

const AF_INET = 2;
const SOCK_STREAM = 1;
const SOCK_NONBLOCK = 0o4000;
const IPPROTO_TCP = 6;
const TCP_NODELAY = 1;
const SOL_SOCKET = 1;
const SO_RCVBUFFORCE = 33;
const POLLIN = 1;
const POLLOUT = 4;
/** So that a burst of 2 MiB, of which a part goes by TCP, waits whole with the reader. */
const RECEIVE_BUFFER = 16 << 20;
const WAIT_MS = 1000;
/** After so long without room, there is none. */
const QUIET_MS = 50;

export function probeAcceleration(): AccelerationTrust {
	// With it first: where it works, no reader can be left sleeping on one of two queues.
	const withIt = probe(true);
	if (withIt.every(({failure}) => failure === undefined)) {
		return {oneQueue: true, findings: withIt};
	}

	const without = probe(false);
	return without.every(({failure}) => failure === undefined) ? {oneQueue: false, findings: without} : {oneQueue: undefined, findings: withIt};
}

function probe(oneQueue: boolean): readonly AccelerationFinding[] {
	let stage: Stage;
	try {
		stage = new Stage(oneQueue);
	} catch (error) {
		return [{name: 'programs', failure: reasonOf(error)}];
	}

	try {
		return Object.entries(PROBES).map(([name, act]) => {
			stage.switch(true);
			const pair = stage.pair(true, RECEIVE_BUFFER);
			try {
				act(stage, pair);
				return {name, failure: undefined};
			} catch (error) {
				return {name, failure: reasonOf(error)};
			} finally {
				pair.close();
			}
		});
	} catch (error) {
		return [{name: 'pairs', failure: reasonOf(error)}];
	} finally {
		stage.close();
	}
}

interface Pair {
	readonly client: number;
	readonly server: number;
	/** Closes the client only. */
	shut(): void;
	close(): void;
}

/** Programs, maps and a namespace of their own. */
class Stage {
	readonly #schema: Schema;
	readonly #maps: Maps;
	readonly #rawMaps: ReadonlyMap<MapName, BpfMap>;
	readonly #programs: ReadonlyMap<ProgramName, BpfProgram>;
	readonly #netns: NetNs;
	readonly #cookie: bigint;
	readonly #cleanup: Array<() => void> = [];

	constructor(oneQueue: boolean) {
		try {
			const {object, schema} = openObject();
			this.#cleanup.push(() => object.close());
			object.load();
			this.#schema = schema;
			const raw = new Map<MapName, BpfMap>(MAP_NAMES.map(name => [name, object.map(name)]));
			this.#cleanup.push(() => {
				for (const map of raw.values()) {
					map.close();
				}
			});
			this.#rawMaps = raw;
			this.#maps = schema.maps(name => raw.get(name)!);
			const names = ['handshake', 'pair', 'join', 'move_bytes', 'one_queue'] as const;
			this.#programs = new Map(names.map(name => [name, object.program(name)]));
			this.#cleanup.push(() => {
				for (const program of this.#programs.values()) {
					program.close();
				}
			});
			this.#netns = native.createNetns();
			this.#cleanup.push(() => this.#netns.close());
			this.#netns.setUp('lo');
			this.#cookie = this.#netns.cookie();
			const link = this.#programs.get('handshake')!.attachCgroup(ownCgroup());
			this.#cleanup.push(() => link.close());
			for (const name of oneQueue ? ['move_bytes', 'one_queue'] as const : ['move_bytes'] as const) {
				this.#programs.get(name)!.attachMapLegacy(raw.get('accelerated')!);
			}

			this.#enrol();
		} catch (error) {
			this.close();
			throw error;
		}
	}

	close(): void {
		for (const undo of this.#cleanup.splice(0).reverse()) {
			undo();
		}
	}

	switch(on: boolean): void {
		this.#maps.node.set(0, {netns: 0n, unknownAddresses: 0n, acceleration: on ? 'ACCELERATION_ON' : 'ACCELERATION_OFF'});
	}

	redirectedMessages(): bigint {
		const {sentByClient, sentByServer} = sumTraffic(this.#schema, this.#maps.traffic.getAll(this.#cookie)!);
		return sentByClient.redirected.messages + sentByServer.redirected.messages;
	}

	/**
	Two connected sockets: plain, or joined.

	@param receiveBuffer - of the server's; undefined: the kernel's own.
	*/
	pair(joined: boolean, receiveBuffer?: number): Pair {
		const open: number[] = [];
		const keep = (fd: number) => {
			open.push(fd);
			return fd;
		};

		const close = () => {
			for (const fd of open.splice(0)) {
				native.closeFd(fd);
			}
		};

		try {
			const listener = keep(this.#netns.socket(AF_INET, SOCK_STREAM, 0));
			if (receiveBuffer !== undefined) {
				// Not later: the window is agreed on with the SYN.
				native.setsockopt(listener, SOL_SOCKET, SO_RCVBUFFORCE, int32(receiveBuffer));
			}

			native.bind(listener, address(0));
			native.listen(listener, 1);
			const to = native.getsockname(listener);
			const client = keep(this.#netns.socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
			native.setsockopt(client, IPPROTO_TCP, TCP_NODELAY, int32(1));
			try {
				native.connect(client, to);
			} catch (error) {
				if (!hasErrno(error, 'EINPROGRESS')) {
					throw error;
				}
			}

			native.poll(client, POLLOUT, WAIT_MS);
			const server = keep(native.accept(listener, SOCK_NONBLOCK));
			native.setsockopt(server, IPPROTO_TCP, TCP_NODELAY, int32(1));
			if (joined) {
				this.#join(portOf(native.getsockname(client)), portOf(to));
			}

			const shut = () => {
				native.closeFd(open.splice(open.indexOf(client), 1)[0]!);
			};

			return {client, server, shut, close};
		} catch (error) {
			close();
			throw error;
		}
	}

	#join(clientPort: number, serverPort: number): void {
		const request = {netns: this.#cookie, peerNetns: this.#cookie, local: '127.0.0.1', remote: '127.0.0.1', localPort: clientPort, remotePort: serverPort};
		const outcome = joinPair({programs: this.#programs, schema: this.#schema, rawMaps: this.#rawMaps}, request, () => native.netnsOfSocket(this.#probeSocket()));
		if (outcome !== 'REASON_ACCELERATED') {
			throw new Error(`two sockets could not be paired: ${outcome}`);
		}
	}

	#probeSocket(): number {
		const fd = this.#netns.socket(AF_INET, SOCK_STREAM, 0);
		this.#cleanup.push(() => native.closeFd(fd));
		return fd;
	}

	#enrol(): void {
		const none = {bytes: 0n, messages: 0n};
		const direction = {redirected: none, passed: this.#schema.tcpReasons.map(() => none)};
		const target = {address: '', source: '', port: 0, inPod: 0, spread: 0};
		this.#maps.traffic.set(this.#cookie, {sentByClient: direction, sentByServer: direction});
		this.#maps.prefixes.set({bits: 32 + 104, policy: 1, address: '127.0.0.0'}, {flags: PREFIX_LOCAL});
		this.#maps.pods.set(this.#cookie, {
			policy: 1, flags: POD_ACCELERATE, exemptCgroupLevels: 0, markCount: 0, marks: Array.from({length: 4}, () => ({value: 0, mask: 0})),
			proxyUid: 0, proxyGid: 0, inboundPort: 0, dnsPort: 0, target4: target, target6: target,
		});
		this.switch(true);
	}
}

type Probe = (stage: Stage, pair: Pair) => void;

const PROBES: Readonly<Record<string, Probe>> = {
	'bytes are redirected'(stage, {client, server}) {
		const before = stage.redirectedMessages();
		for (let round = 0; round < 20; round++) {
			exchange(client, server, 64);
			exchange(server, client, 64);
		}

		expect(stage.redirectedMessages() - before > 30n, `of 40 messages ${stage.redirectedMessages() - before} were`);
	},

	'FIONREAD counts redirected bytes'(_, {client, server}) {
		exchange(client, server, 1);
		native.send(client, stream(0, 100));
		const unread = native.unread(server);
		expect(unread === 100, `100 bytes count as ${unread}`);
	},

	'FIONREAD counts bytes that came by TCP'(stage, {client, server}) {
		exchange(client, server, 1);
		stage.switch(false);
		native.send(client, stream(0, 100));
		waitFor(server);
		const unread = native.unread(server);
		expect(unread === 100, `100 bytes count as ${unread}`);
	},

	'level-triggered readers wake up'(stage, {client, server}) {
		for (const on of [true, false, true]) {
			stage.switch(on);
			for (let round = 0; round < 10; round++) {
				native.send(client, stream(0, 10));
				waitFor(server);
				receiveAll(server, 10);
				expect(native.poll(server, POLLIN, 0) === 0, 'a socket that was read empty is said to be readable');
			}
		}
	},

	'edge-triggered readers wake up'(stage, {client, server}) {
		const watcher = native.watchEdges(server);
		try {
			for (const on of [true, false, true]) {
				stage.switch(on);
				for (let round = 0; round < 10; round++) {
					native.send(client, stream(0, 10));
					expect(native.waitEdge(watcher, WAIT_MS), `no edge for bytes that ${on ? 'may be redirected' : 'came by TCP'}`);
					receiveAll(server, 10);
				}
			}
		} finally {
			native.closeFd(watcher);
		}
	},

	'a short read leaves nothing unread'(_, {client, server}) {
		// Redirected bytes up to the bound, and by TCP what is beyond: a reader that takes a short read for the end must not leave any.
		for (let round = 0; round < 3; round++) {
			const total = fill(client, 2 << 20, 4096);
			waitUntilUnread(server, total);
			let received = 0;
			for (let got = 40_000; got === 40_000; received += got) {
				got = native.receive(server, 40_000).length;
			}

			expect(received === total, `after a short read ${total - received} of ${total} bytes are still there`);
		}
	},

	'order and every byte, while it is switched on and off'(stage, pair) {
		pump(stage, pair.client, pair.server, 4 << 20);
		pump(stage, pair.server, pair.client, 4 << 20);
	},

	'a reader that stopped is not sent more than a bound'(stage, {client, server}) {
		const before = stage.redirectedMessages();
		const sent = fill(client, 20_000, 1);
		const messages = stage.redirectedMessages() - before;
		expect(messages < 1000n, `${messages} messages of one byte were queued`);
		receiveAll(server, sent);
		const [plain, joined] = [stage.pair(false), stage.pair(true)];
		try {
			const accepted = fillUp(plain.client);
			const more = fillUp(joined.client);
			expect(more <= 2 * accepted, `${more} bytes were accepted, ${accepted} by plain TCP`);
			receiveAll(joined.server, more);
			exchange(joined.client, joined.server, 10);
		} finally {
			plain.close();
			joined.close();
		}
	},

	'the end of the stream comes after its bytes'(_, {client, server, shut}) {
		exchange(client, server, 1);
		native.send(client, stream(0, 1000));
		shut();
		receiveAll(server, 1000);
		waitFor(server);
		expect(native.receive(server, 1).length === 0, 'there are bytes behind the end');
	},
};

/** What a stream has at this offset: nothing that repeats soon. */
const PATTERN = Uint8Array.from({length: 65_537 + 131_072}, (_, index) => {
	const at = index % 65_537;
	return ((at * 2_654_435_761) >>> 13) & 0xff;
});

function stream(offset: number, length: number): Uint8Array {
	const start = offset % 65_537;
	return PATTERN.subarray(start, start + Math.min(length, 131_072));
}

function exchange(from: number, to: number, length: number): void {
	native.send(from, stream(0, length));
	waitFor(to);
	receiveAll(to, length);
}

function waitFor(fd: number): void {
	expect((native.poll(fd, POLLIN, WAIT_MS) & POLLIN) !== 0, 'what was sent did not arrive');
}

/** Reads exactly that many bytes. */
function receiveAll(fd: number, length: number): void {
	for (let received = 0; received < length;) {
		waitFor(fd);
		received += native.receive(fd, Math.min(length - received, 1 << 20)).length;
	}
}

/** Sends until there is no room, or `limit` bytes went. @returns how many. */
function fill(fd: number, limit: number, piece: number): number {
	let sent = 0;
	try {
		while (sent < limit) {
			sent += native.send(fd, stream(sent, Math.min(piece, limit - sent)));
		}
	} catch (error) {
		if (!hasErrno(error, 'EAGAIN')) {
			throw error;
		}
	}

	return sent;
}

/** Sends until there is no room, and none comes. @returns how many bytes. */
function fillUp(fd: number): number {
	let sent = 0;
	do {
		sent += fill(fd, 1 << 30, 65_536);
	} while (native.poll(fd, POLLOUT, QUIET_MS) !== 0);
	return sent;
}

/** Where FIONREAD is wrong, for as long as a busy machine may need. */
function waitUntilUnread(fd: number, bytes: number): void {
	const deadline = performance.now() + WAIT_MS;
	while (native.unread(fd) < bytes && performance.now() < deadline) {
		Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1);
	}
}

/** Pieces of all sizes, a reader that lags, and the switch turned now and then. */
function pump(stage: Stage, from: number, to: number, total: number): void {
	let seed = 1;
	const random = (limit: number) => {
		seed = (Math.imul(seed, 1_664_525) + 1_013_904_223) >>> 0;
		return (seed >>> 8) % limit;
	};

	let sent = 0;
	let received = 0;
	let idle = 0;
	let burst = 0;
	while (received < total) {
		if (random(40) === 0) {
			stage.switch(random(3) > 0);
		}

		burst = burst > 0 ? burst - 1 : random(12);
		const sends = burst > 4 && sent < total;
		try {
			if (sends) {
				sent += native.send(from, stream(sent, Math.min(total - sent, 1 + random([64, 4096, 65_536][random(3)]!))));
			} else {
				const got = native.receive(to, 1 + random(100_000));
				expect(Buffer.compare(got, stream(received, got.length)) === 0, `wrong bytes after ${received}`);
				received += got.length;
			}

			idle = 0;
		} catch (error) {
			if (!hasErrno(error, 'EAGAIN')) {
				throw error;
			}

			if (!sends && received < sent) {
				native.poll(to, POLLIN, 20);
			}

			expect(++idle < 500, `${sent} bytes were sent, and after ${received} nothing comes`);
		}
	}

	stage.switch(true);
}

function expect(holds: boolean, otherwise: string): void {
	if (!holds) {
		throw new Error(otherwise);
	}
}

function int32(value: number): Uint8Array {
	return new Uint8Array(Int32Array.of(value).buffer);
}

/** 127.0.0.1 as struct sockaddr_in. */
function address(port: number): Uint8Array {
	return Uint8Array.of(AF_INET, 0, port >> 8, port & 0xff, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0);
}

function portOf(name: Uint8Array): number {
	return (name[2]! << 8) | name[3]!;
}
