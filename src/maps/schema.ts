/**
What TypeScript expects of bpf/layout.h. Only names and meanings: sizes, offsets and byte orders come from the object's BTF, and the test of this
file compares the two.
*/
import type {BpfMap} from '../native.js';
import {Btf} from './btf.js';
import {createCodec, type Codec} from './codec.js';
import {PerCpuMap, TypedMap} from './map.js';

/** A network namespace's cookie: a pod's identity in the kernel. */
export type NetnsCookie = bigint;

export interface Mark {
	readonly value: number;
	readonly mask: number;
}

export interface Target {
	/** '' is none. */
	readonly address: string;
	readonly source: string;
	readonly port: number;
	readonly inPod: number;
	readonly spread: number;
}

export interface PodValue {
	readonly policy: number;
	readonly flags: number;
	readonly exemptCgroupLevels: number;
	readonly markCount: number;
	readonly marks: readonly Mark[];
	readonly proxyUid: number;
	readonly proxyGid: number;
	readonly inboundPort: number;
	readonly dnsPort: number;
	readonly target4: Target;
	readonly target6: Target;
}

export interface PodInfo {
	readonly name: string;
	readonly mode: string;
	readonly address4: string;
	readonly address6: string;
	readonly netnsDevice: bigint;
	readonly netnsInode: bigint;
	readonly enrolledAtMs: bigint;
	/** NAMESPACE_… bits: what was changed in its namespace, and is changed back at the end. */
	readonly namespaceChanges: number;
}

export interface PrefixKey {
	readonly bits: number;
	readonly policy: number;
	readonly address: string;
}

export interface PrefixValue {
	/** PREFIX_… bits. */
	readonly flags: number;
}

export interface PortKey {
	readonly policy: number;
	readonly port: number;
}

export interface PortValue {
	/** PORT_… bits. */
	readonly flags: number;
}

export interface AddressKey {
	readonly bits: number;
	readonly address: string;
}

export interface PassKey {
	readonly client: string;
	readonly server: string;
	readonly clientPort: number;
	readonly serverPort: number;
}

export interface PassValue {
	readonly reason: string;
}

export interface NodeValue {
	readonly netns: NetnsCookie;
	/** Inbound SYNs refused because they came to an address that no pod is known by. */
	readonly unknownAddresses: bigint;
	/** enum acceleration. */
	readonly acceleration: string;
}

/** struct request. */
export interface PairRequest {
	readonly netns: NetnsCookie;
	/** 0 is none. */
	readonly peerNetns: NetnsCookie;
	readonly local: string;
	readonly remote: string;
	readonly localPort: number;
	readonly remotePort: number;
}

export interface PairEnd {
	/** 0: not looked for yet. */
	readonly cookie: bigint;
	readonly sock: bigint;
	readonly sndUna: number;
	readonly sndNxt: number;
	readonly rcvNxt: number;
}

/** struct pairing. */
export interface Pairing {
	readonly request: PairRequest;
	readonly client: PairEnd;
	readonly server: PairEnd;
	/** PAIR_… bits. */
	readonly here: number;
	/** enum reason. */
	readonly outcome: string;
}

export interface Joined {
	/** enum reason. */
	readonly outcome: string;
}

export interface Volume {
	readonly bytes: bigint;
	readonly messages: bigint;
}

export interface Direction {
	readonly redirected: Volume;
	/** By enum tcp_reason. */
	readonly passed: readonly Volume[];
}

export interface Traffic {
	readonly sentByClient: Direction;
	readonly sentByServer: Direction;
}

export interface ExemptionKey {
	readonly policy: number;
	readonly kind: 'EXEMPT_UID' | 'EXEMPT_GID' | 'EXEMPT_CGROUP' | 'EXEMPT_INTERFACE';
	readonly id: bigint;
}

export interface ExemptionValue {
	readonly present: number;
}

export interface Counters {
	/** By enum reason. */
	readonly count: readonly bigint[];
}

export interface HandshakeKey {
	readonly netns: bigint;
	readonly client: string;
	readonly proxy: string;
	readonly clientPort: number;
	readonly proxyPort: number;
}

export interface OriginalDst {
	readonly address: string;
	readonly port: number;
	readonly inPod: number;
	readonly role: string;
	readonly netns: bigint;
	readonly dnsPort: number;
}

/** struct flow. */
export interface Flow {
	readonly netns: NetnsCookie;
	/** '' is none. */
	readonly source: string;
	readonly destination: string;
	readonly sourcePort: number;
	readonly destinationPort: number;
	/** 6 TCP, 17 UDP. */
	readonly protocol: number;
	readonly mark: number;
	readonly uid: number;
	readonly gid: number;
	/** Its index; 0 is none. */
	readonly interface: number;
	readonly inExemptCgroup: number;
}

/** struct question. */
export interface Question {
	readonly flow: Flow;
	/** enum reason. */
	readonly outbound: string;
	readonly inbound: string;
}

/** struct socket_record. */
export interface SocketRecord {
	readonly local: string;
	readonly remote: string;
	readonly localPort: number;
	readonly remotePort: number;
	readonly state: number;
	readonly uid: number;
	readonly mark: number;
	readonly outbound: string;
	readonly inbound: string;
	/** enum role; 0 when it was not captured. */
	readonly role: number;
	readonly ipv6Socket: number;
	readonly original: string;
	readonly originalPort: number;
	readonly accelerated: number;
	/** 0: its messages are redirected; else 1 + enum tcp_reason of the last. */
	readonly onTcp: number;
	readonly redirectedBytes: bigint;
	readonly passedBytes: bigint;
	readonly fallbacks: bigint;
}

export interface BuildRecord {
	readonly layout: number;
	readonly version: string;
	readonly objectSha256: string;
}

export const MARKS_MAX = 4;

/** The bits of bpf/layout.h; their test compares the two. */
export const POD_SIDECAR = 1;
export const POD_EXEMPT_UIDS = 2;
export const POD_EXEMPT_GIDS = 4;
export const POD_EXEMPT_INTERFACES = 8;
export const POD_PORTS = 16;
export const POD_INCLUDE_ALL = 32;
export const POD_INCLUDE_LOOPBACK = 64;
export const POD_INBOUND = 128;
export const POD_INBOUND_ALL = 256;
export const POD_PASS_NODE = 512;
export const POD_KEEP_SOURCE = 1024;
export const POD_ACCELERATE = 2048;
export const POD_ACCELERATE_ALWAYS = 4096;

export const PAIR_CLIENT = 1;
export const PAIR_SERVER = 2;

export const PREFIX_LOCAL = 1;
export const PREFIX_NOT_UNICAST = 2;
export const PREFIX_LOCALHOST = 4;
export const PREFIX_EXCLUDED = 8;
export const PREFIX_INCLUDED = 16;
export const PREFIX_INTERFACE = 32;

export const PORT_OUTBOUND_EXCLUDED = 1;
export const PORT_OUTBOUND_INCLUDED = 2;
export const PORT_INBOUND_EXCLUDED = 4;
export const PORT_INBOUND_INCLUDED = 8;

export const NAMESPACE_RULE4 = 1;
export const NAMESPACE_RULE6 = 2;
export const NAMESPACE_ROUTE4 = 4;
export const NAMESPACE_ROUTE6 = 8;
export const NAMESPACE_ACCEPT = 16;
export const NAMESPACE_REFLECT4 = 32;
export const NAMESPACE_REFLECT6 = 64;
export const NAMESPACE_PASSTHROUGH = 128;

export const KEPT_SOURCE_MARK = 0x1_11;
export const KEPT_SOURCE_MASK = 0xf_ff;

export const ROLE_CLIENT = 1;
export const ROLE_PROXY = 2;

/** Every map that is pinned. */
export const MAP_NAMES = [
	'pods', 'pod_info', 'counters', 'prefixes', 'ports', 'exemptions', 'addresses', 'passes', 'listeners', 'listener_slots', 'client_ports', 'handshakes', 'original_dsts',
	'accelerated', 'msg_programs', 'acceleration_of', 'joining', 'traffic', 'requests', 'node', 'build',
] as const;
export type MapName = typeof MAP_NAMES[number];

/** Socket storage, ring buffers and slots for programs have no entries that user space could walk. */
export const UNWALKABLE: readonly MapName[] = ['original_dsts', 'listener_slots', 'acceleration_of', 'joining', 'requests', 'msg_programs'];

/** Counts and nothing else, per CPU. */
export const TALLIES: readonly MapName[] = ['counters', 'traffic'];

export interface Maps {
	readonly pods: TypedMap<NetnsCookie, PodValue>;
	readonly podInfo: TypedMap<NetnsCookie, PodInfo>;
	readonly counters: PerCpuMap<NetnsCookie, Counters>;
	readonly prefixes: TypedMap<PrefixKey, PrefixValue>;
	readonly ports: TypedMap<PortKey, PortValue>;
	readonly exemptions: TypedMap<ExemptionKey, ExemptionValue>;
	readonly addresses: TypedMap<AddressKey, NetnsCookie>;
	readonly passes: TypedMap<PassKey, PassValue>;
	readonly handshakes: TypedMap<HandshakeKey, OriginalDst>;
	readonly traffic: PerCpuMap<NetnsCookie, Traffic>;
	readonly node: TypedMap<number, NodeValue>;
	readonly build: TypedMap<number, BuildRecord>;
}

/** `REASON_BYPASS_MARK` as people see it: `bypass_mark`. */
export function reasonName(enumerator: string): string {
	return enumerator.replace(/^REASON_/, '').toLowerCase();
}

/** What the object says of itself: its types, and the enums that people see. */
export class Schema {
	readonly btf: Btf;
	/** enum reason, in the order of struct counters, as `redirected`, `bypass_mark`, …. */
	readonly reasons: readonly string[];
	readonly layoutVersion: number;
	/** enum tcp_reason, in the order of struct direction, as `large`, `full`, …. */
	readonly tcpReasons: readonly string[];

	constructor(btf: Uint8Array) {
		this.btf = new Btf(btf);
		this.layoutVersion = this.btf.enum('layout').get('LAYOUT_VERSION')!;
		this.tcpReasons = [...this.btf.enum('tcp_reason')].sort(([, a], [, b]) => a - b).map(([name]) => name.replace(/^TCP_/, '').toLowerCase()).slice(0, -1);
		this.reasons = [...this.btf.enum('reason')]
			.filter(([name]) => name !== 'REASONS')
			.sort(([, a], [, b]) => a - b)
			.map(([name]) => reasonName(name));
	}

	/** Bytes of a map's key and value. */
	sizes(name: MapName): {readonly key: number; readonly value: number} {
		if (name === 'requests') {
			return {key: 0, value: 0};
		}

		const {key, value} = this.#types(name);
		return {key: this.btf.size(key), value: this.btf.size(value)};
	}

	typed<K, V>(name: MapName, raw: BpfMap): TypedMap<K, V> {
		const {key, value} = this.#types(name);
		return new TypedMap(name, raw, createCodec<K>(this.btf, key), createCodec<V>(this.btf, value));
	}

	/** @param open - gives the raw map of a name. */
	maps(open: (name: MapName) => BpfMap): Maps {
		const counters = this.#types('counters');
		const traffic = this.#types('traffic');
		return {
			pods: this.typed('pods', open('pods')),
			podInfo: this.typed('pod_info', open('pod_info')),
			counters: new PerCpuMap('counters', open('counters'), createCodec<NetnsCookie>(this.btf, counters.key), createCodec<Counters>(this.btf, counters.value)),
			prefixes: this.typed('prefixes', open('prefixes')),
			ports: this.typed('ports', open('ports')),
			addresses: this.typed('addresses', open('addresses')),
			passes: this.typed('passes', open('passes')),
			traffic: new PerCpuMap('traffic', open('traffic'), createCodec<NetnsCookie>(this.btf, traffic.key), createCodec<Traffic>(this.btf, traffic.value)),
			node: this.typed('node', open('node')),
			exemptions: this.typed('exemptions', open('exemptions')),
			handshakes: this.typed('handshakes', open('handshakes')),
			build: this.typed('build', open('build')),
		};
	}

	/** Of a struct that is in no map: `question`, `socket_record`. */
	codec<T>(struct: string): Codec<T> {
		return createCodec<T>(this.btf, this.btf.struct(struct));
	}

	#types(name: MapName) {
		const types = this.btf.maps().get(name);
		if (!types) {
			throw new RangeError(`the object has no map ${name}`);
		}

		return types;
	}
}

/** A pod's traffic, summed over the CPUs: by direction, redirected, and passed by reason. */
export function sumTraffic(schema: Schema, perCpu: readonly Traffic[]) {
	const sum = (pick: (traffic: Traffic) => Volume) => perCpu.map(pick).reduce((total, {bytes, messages}) => ({bytes: total.bytes + bytes, messages: total.messages + messages}), {bytes: 0n, messages: 0n});
	const direction = (pick: (traffic: Traffic) => Direction) => ({
		redirected: sum(traffic => pick(traffic).redirected),
		passed: Object.fromEntries(schema.tcpReasons.map((reason, index) => [reason, sum(traffic => pick(traffic).passed[index]!)])),
	});
	const sentByClient = direction(traffic => traffic.sentByClient);
	const sentByServer = direction(traffic => traffic.sentByServer);
	return {
		redirectedBytes: sentByClient.redirected.bytes + sentByServer.redirected.bytes,
		redirectedMessages: sentByClient.redirected.messages + sentByServer.redirected.messages,
		sentByClient,
		sentByServer,
	};
}

/** A pod's counters, summed over the CPUs, by reason. */
export function sumCounters(schema: Schema, perCpu: readonly Counters[]): ReadonlyMap<string, bigint> {
	return new Map(schema.reasons.map((reason, index) => [reason, perCpu.reduce((sum, {count}) => sum + (count[index] ?? 0n), 0n)]));
}
