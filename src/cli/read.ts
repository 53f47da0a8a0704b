/** What the reading commands show; all of it comes from the kernel: pins, and the pods' own namespaces. */
import {AgentError, hasErrno} from '../errors.js';
import type {CgroupProgramName, Datapath} from '../loader/datapath.js';
import {UNWALKABLE, reasonName, sumCounters, sumTraffic, type Flow, type MapName, type NetnsCookie, type PodInfo, type PodValue, type Question, type Target} from '../maps/schema.js';
import {findNetns} from '../pods/facts.js';
import {readSockets, resetMissed, type PodSocket} from '../pods/sockets.js';
import type {Row} from './format.js';

/** `enum bpf_map_type`, those that are used here. */
const MAP_TYPES: Readonly<Record<number, string>> = {1: 'hash', 2: 'array', 5: 'percpu_hash', 9: 'lru_hash', 11: 'lpm_trie', 18: 'sockhash', 24: 'sk_storage'};
/** Maps with a `flags` in their value, and the enum that names its bits. */
const FLAGS: Readonly<Partial<Record<MapName, string>>> = {pods: 'pod_flags', prefixes: 'prefix_flags', ports: 'port_flags'};

export function statusRows(datapath: Datapath, {agentRunning, networks}: {readonly agentRunning: boolean; readonly networks: readonly string[]}) {
	const build = datapath.maps.build.get(0);
	return {
		agent: agentRunning ? 'running' : 'not running (capture goes on without it)',
		pins: datapath.layout.current,
		version: build?.version ?? 'unknown',
		object: build?.objectSha256.slice(0, 16) ?? 'unknown',
		pods: datapath.rawMaps.get('pods')!.count(),
		cniPlugin: networks.length > 0 ? `in ${networks.join(', ')}${agentRunning ? '' : ': no pod starts without an agent'}` : 'not installed',
		refusedAtUnknownAddresses: datapath.maps.node.get(0)?.unknownAddresses,
		programs: [...datapath.programs].map(([name, program]) => {
			const {id, tag, runCount, runTimeNs} = program.info();
			return {program: name, id, tag, attached: attachment(datapath, name, id), runs: runCount, averageNs: runCount > 0n ? runTimeNs / runCount : undefined};
		}),
	};
}

function attachment(datapath: Datapath, name: string, id: number): string {
	if (name === 'inbound') {
		return `${datapath.steeredPods().length} namespaces`;
	}

	const link = datapath.links.get(name as CgroupProgramName)?.info();
	if (!link) {
		return 'when asked';
	}

	return link.targetId === 0n ? 'no: its cgroup is gone' : link.programId === id ? `cgroup ${link.targetId}` : `cgroup ${link.targetId}, runs program ${link.programId} instead`;
}

export function describePods(datapath: Datapath) {
	const {maps, schema} = datapath;
	const infos = new Map(maps.podInfo.entries());
	const steered = new Set(datapath.steeredPods());
	const exemptions = maps.exemptions.entries().map(([key]) => key);
	return maps.pods.entries().map(([netns, pod]) => {
		const info = infos.get(netns);
		const reasons = sumCounters(schema, maps.counters.getAll(netns) ?? []);
		const sum = (prefix: string) => [...reasons].filter(([reason]) => reason.startsWith(prefix)).reduce((total, [, count]) => total + count, 0n);
		const ids = (kind: string) => exemptions.filter(key => key.policy === pod.policy && key.kind === kind).map(({id}) => id);
		return {
			name: info?.name ?? '(unnamed)',
			mode: info?.mode ?? '-',
			ips: [info?.address4, info?.address6].filter(Boolean).join(','),
			proxy: [pod.target4, pod.target6].map(showTarget).filter(Boolean).join(','),
			netns,
			redirected: sum('redirected'),
			accepted: sum('accepted'),
			steered: sum('steered'),
			bypassed: sum('bypass_') + sum('inbound_bypass_'),
			refused: sum('refused_') + sum('inbound_refused'),
			failed: sum('connect_failed') + sum('original_dst_lost') + sum('pass_lost'),
			inbound: steered.has(netns) ? `:${pod.inboundPort}` : '-',
			dns: pod.dnsPort === 0 ? '-' : `:${pod.dnsPort}`,
			enrolledAt: new Date(Number(info?.enrolledAtMs ?? 0n)).toISOString(),
			exempt: {
				marks: pod.marks.slice(0, pod.markCount).map(({value, mask}) => `0x${value.toString(16)}/0x${mask.toString(16)}`),
				uids: ids('EXEMPT_UID').map(Number),
				gids: ids('EXEMPT_GID').map(Number),
				cgroups: ids('EXEMPT_CGROUP').map(String),
				interfaces: ids('EXEMPT_INTERFACE').map(Number),
			},
			acceleration: sumTraffic(schema, maps.traffic.getAll(netns) ?? []),
			flags: flagNames(datapath, 'pods', pod.flags),
			reasons: Object.fromEntries(reasons),
		};
	}).sort((a, b) => a.name.localeCompare(b.name));
}

function showTarget({address, port}: Target): string {
	return address === '' ? '' : address.includes(':') ? `[${address}]:${port}` : `${address}:${port}`;
}

export function listMaps(datapath: Datapath): readonly Row[] {
	return [...datapath.rawMaps].map(([name, map]) => {
		const {id, type, keySize, valueSize, maxEntries} = map.info();
		const walkable = !UNWALKABLE.includes(name);
		return {name, id, type: MAP_TYPES[type] ?? String(type), keyBytes: keySize, valueBytes: valueSize, entries: walkable ? map.count() : undefined, capacity: walkable ? maxEntries : undefined};
	});
}

export function dumpMap(datapath: Datapath, name: MapName): readonly Row[] {
	const {maps, schema} = datapath;
	switch (name) {
		case 'counters': {
			return maps.counters.entriesPerCpu().map(([netns, perCpu]) => ({netns, ...Object.fromEntries(sumCounters(schema, perCpu))}));
		}

		default: {
			const map = schema.typed<unknown, unknown>(name, datapath.rawMaps.get(name)!);
			return map.entries().map(([key, value]) => {
				const row: Row = {...flatten('key', key), ...flatten('value', value)};
				return typeof row['flags'] === 'number' ? {...row, flags: flagNames(datapath, name, row['flags'])} : row;
			});
		}
	}
}

/** A struct's fields become columns. */
function flatten(name: string, value: unknown): Row {
	return typeof value === 'object' && value !== null && !Array.isArray(value) ? value as Row : {[name]: value};
}

/** `local,excluded` for the bits of PREFIX_LOCAL and PREFIX_EXCLUDED. */
function flagNames({schema}: Datapath, map: MapName, flags: number): string {
	const names = [...schema.btf.enum(FLAGS[map]!)].filter(([, bit]) => flags & bit).map(([name]) => name.replace(/^[A-Z]+_/, '').toLowerCase());
	return names.join(',') || '-';
}

class UnknownPodError extends AgentError {
	readonly code = 'ERR_UNKNOWN_POD';

	constructor(readonly pod: string) {
		super(`no pod ${pod} is enrolled: see \`sidestep pods\``);
	}
}

export interface EnrolledPod {
	readonly cookie: NetnsCookie;
	readonly value: PodValue;
	readonly info: PodInfo;
}

/** @throws UnknownPodError */
export function findPods({maps}: Datapath, name?: string): readonly EnrolledPod[] {
	const values = new Map(maps.pods.entries());
	const pods = maps.podInfo.entries().flatMap(([cookie, info]) => {
		const value = values.get(cookie);
		return value && (name === undefined || info.name === name) ? [{cookie, value, info}] : [];
	});
	if (name !== undefined && pods.length === 0) {
		throw new UnknownPodError(name);
	}

	return pods;
}

/** What the connection would meet: counters' reasons. `inbound` is undefined where nothing inbound is captured. */
export function explain({programs, schema}: Datapath, flow: Flow): {readonly outbound: string; readonly inbound: string | undefined} {
	const codec = schema.codec<Question>('question');
	const {data} = programs.get('explain')!.testRun({data: codec.encode({flow, outbound: 'REASONS', inbound: 'REASONS'})});
	const {outbound, inbound} = codec.decode(data);
	return {outbound: reasonName(outbound), inbound: inbound === 'REASONS' ? undefined : reasonName(inbound)};
}

/** What a packet from outside then meets: also its pod has to be found by the address, and a listener. */
export function inboundDecision({maps, schema, rawMaps}: Datapath, {cookie, value}: EnrolledPod, to: {readonly address: string}, decision: string | undefined): string {
	if (decision === undefined) {
		return 'inbound is not captured';
	}

	const owner = maps.addresses.get({bits: 128, address: to.address});
	if (owner !== cookie) {
		return owner === undefined ? 'refused: no pod is known by this address' : `not for this pod: it is an address of ${maps.podInfo.get(owner)?.name}`;
	}

	const listeners = schema.typed<{netns: NetnsCookie; port: number}, bigint>('listeners', rawMaps.get('listeners')!).entries();
	const hasListener = listeners.some(([key]) => key.netns === cookie && key.port === value.inboundPort);
	return decision === 'steered' && !hasListener ? 'inbound_refused' : decision;
}

/** @returns rows, and how many were reset; undefined when its namespace is not found: it has ended, or this process may not look at others' namespaces. */
export function podSockets(datapath: Datapath, {cookie, info}: EnrolledPod, options: {readonly proc: string; readonly onlyMissed: boolean; readonly reset: boolean}): {readonly rows: readonly Row[]; readonly reset: number} | undefined {
	const netns = findNetns(options.proc, {device: info.netnsDevice, inode: info.netnsInode}, cookie);
	if (!netns) {
		return undefined;
	}

	try {
		const sockets = readSockets(datapath, netns).filter(({isMissed}) => isMissed || !options.onlyMissed);
		return {rows: sockets.map(socket => socketRow(datapath.schema, info.name, socket)), reset: options.reset ? resetMissed(sockets, netns) : 0};
	} finally {
		netns.close();
	}
}

/** Undefined when its namespace is not found, or this process may not enter it. */
export function countMissed(datapath: Datapath, name: string, proc: string): number | undefined {
	try {
		return podSockets(datapath, findPods(datapath, name)[0]!, {proc, onlyMissed: true, reset: false})?.rows.length;
	} catch (error) {
		if (hasErrno(error, 'EPERM', 'EACCES')) {
			return undefined;
		}

		throw error;
	}
}

function socketRow({tcpReasons}: Datapath['schema'], pod: string, {record, direction, state, reason, isCaptured, isMissed}: PodSocket): Row {
	const end = (address: string, port: number) => address.includes(':') || address === '' ? `[${address || '::'}]:${port}` : `${address}:${port}`;
	return {
		pod,
		direction,
		state,
		local: end(record.local, record.localPort),
		remote: direction === 'listen' ? '-' : end(record.remote, record.remotePort),
		original: isCaptured ? end(record.original, record.originalPort) : '-',
		accelerated: record.accelerated === 0 ? 'no' : record.onTcp === 0 ? 'yes' : tcpReasons[record.onTcp - 1],
		redirectedBytes: record.redirectedBytes,
		passedBytes: record.passedBytes,
		fallbacks: record.fallbacks,
		captured: isCaptured ? 'yes' : isMissed ? 'MISSED' : 'no',
		now: reason || '-',
		uid: record.uid,
		mark: `0x${record.mark.toString(16)}`,
	};
}
