/**
What TypeScript expects of bpf/layout.h. Only names and meanings: sizes, offsets and byte orders come from the object's BTF, and the test of this
file compares the two.
*/
import type {BpfMap} from '../native.js';
import {Btf} from './btf.js';
import {createCodec} from './codec.js';
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
}

export interface PodValue {
	readonly policy: number;
	readonly flags: number;
	readonly exemptCgroupLevels: number;
	readonly markCount: number;
	readonly marks: readonly Mark[];
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
}

export interface PrefixKey {
	readonly bits: number;
	readonly policy: number;
	readonly address: string;
}

export interface PrefixValue {
	readonly kind: 'PREFIX_LOCAL' | 'PREFIX_NOT_UNICAST';
}

export interface ExemptionKey {
	readonly policy: number;
	readonly kind: 'EXEMPT_UID' | 'EXEMPT_GID' | 'EXEMPT_CGROUP';
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
}

export interface BuildRecord {
	readonly layout: number;
	readonly version: string;
	readonly objectSha256: string;
}

export const MARKS_MAX = 4;
export const POD_EXEMPT_UIDS = 1;
export const POD_EXEMPT_GIDS = 2;

/** Every map that is pinned. `original_dsts` is socket storage: it has no entries that user space could walk. */
export const MAP_NAMES = ['pods', 'pod_info', 'counters', 'prefixes', 'exemptions', 'handshakes', 'original_dsts', 'build'] as const;
export type MapName = typeof MAP_NAMES[number];

export interface Maps {
	readonly pods: TypedMap<NetnsCookie, PodValue>;
	readonly podInfo: TypedMap<NetnsCookie, PodInfo>;
	readonly counters: PerCpuMap<NetnsCookie, Counters>;
	readonly prefixes: TypedMap<PrefixKey, PrefixValue>;
	readonly exemptions: TypedMap<ExemptionKey, ExemptionValue>;
	readonly handshakes: TypedMap<HandshakeKey, OriginalDst>;
	readonly build: TypedMap<number, BuildRecord>;
}

/** What the object says of itself: its types, and the enums that people see. */
export class Schema {
	readonly btf: Btf;
	/** enum reason, in the order of struct counters, as `REDIRECTED`, `BYPASS_MARK`, …. */
	readonly reasons: readonly string[];
	readonly layoutVersion: number;

	constructor(btf: Uint8Array) {
		this.btf = new Btf(btf);
		this.layoutVersion = this.btf.enum('layout').get('LAYOUT_VERSION')!;
		this.reasons = [...this.btf.enum('reason')]
			.filter(([name]) => name !== 'REASONS')
			.sort(([, a], [, b]) => a - b)
			.map(([name]) => name.replace(/^REASON_/, '').toLowerCase());
	}

	/** Bytes of a map's key and value. */
	sizes(name: MapName): {readonly key: number; readonly value: number} {
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
		return {
			pods: this.typed('pods', open('pods')),
			podInfo: this.typed('pod_info', open('pod_info')),
			counters: new PerCpuMap('counters', open('counters'), createCodec<NetnsCookie>(this.btf, counters.key), createCodec<Counters>(this.btf, counters.value)),
			prefixes: this.typed('prefixes', open('prefixes')),
			exemptions: this.typed('exemptions', open('exemptions')),
			handshakes: this.typed('handshakes', open('handshakes')),
			build: this.typed('build', open('build')),
		};
	}

	#types(name: MapName) {
		const types = this.btf.maps().get(name);
		if (!types) {
			throw new RangeError(`the object has no map ${name}`);
		}

		return types;
	}
}

/** A pod's counters, summed over the CPUs, by reason. */
export function sumCounters(schema: Schema, perCpu: readonly Counters[]): ReadonlyMap<string, bigint> {
	return new Map(schema.reasons.map((reason, index) => [reason, perCpu.reduce((sum, {count}) => sum + (count[index] ?? 0n), 0n)]));
}
