/** What the reading commands show; all of it comes from the pins. */
import type {Datapath} from '../loader/datapath.js';
import {POD_EXEMPT_GIDS, POD_EXEMPT_UIDS, sumCounters, type MapName, type Target} from '../maps/schema.js';
import type {Row} from './format.js';

/** `enum bpf_map_type`, those that are used here. */
const MAP_TYPES: Readonly<Record<number, string>> = {1: 'hash', 2: 'array', 5: 'percpu_hash', 11: 'lpm_trie', 24: 'sk_storage'};

export function statusRows(datapath: Datapath, agentRunning: boolean) {
	const build = datapath.maps.build.get(0);
	return {
		agent: agentRunning ? 'running' : 'not running (capture goes on without it)',
		pins: datapath.layout.current,
		version: build?.version ?? 'unknown',
		object: build?.objectSha256.slice(0, 16) ?? 'unknown',
		pods: datapath.rawMaps.get('pods')!.count(),
		programs: [...datapath.programs].map(([name, program]) => {
			const {id, tag, runCount, runTimeNs} = program.info();
			const link = datapath.links.get(name)!.info();
			return {
				program: name,
				id,
				tag,
				attached: link.targetId === 0n ? 'no: its cgroup is gone' : link.programId === id ? `cgroup ${link.targetId}` : `cgroup ${link.targetId}, runs program ${link.programId} instead`,
				runs: runCount,
				averageNs: runCount > 0n ? runTimeNs / runCount : undefined,
			};
		}),
	};
}

export function describePods({maps, schema}: Datapath) {
	const infos = new Map(maps.podInfo.entries());
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
			bypassed: sum('bypass_'),
			refused: sum('refused_'),
			failed: sum('connect_failed') + sum('original_dst_lost'),
			enrolledAt: new Date(Number(info?.enrolledAtMs ?? 0n)).toISOString(),
			exempt: {
				marks: pod.marks.slice(0, pod.markCount).map(({value, mask}) => `0x${value.toString(16)}/0x${mask.toString(16)}`),
				uids: pod.flags & POD_EXEMPT_UIDS ? ids('EXEMPT_UID').map(Number) : [],
				gids: pod.flags & POD_EXEMPT_GIDS ? ids('EXEMPT_GID').map(Number) : [],
				cgroups: ids('EXEMPT_CGROUP').map(String),
			},
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
		const walkable = name !== 'original_dsts';
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
			return map.entries().map(([key, value]) => ({...flatten('key', key), ...flatten('value', value)}));
		}
	}
}

/** A struct's fields become columns. */
function flatten(name: string, value: unknown): Row {
	return typeof value === 'object' && value !== null && !Array.isArray(value) ? value as Row : {[name]: value};
}
