/** What the kernel holds of pods, read from maps and links, and the words in which that is compared with the model. */
import type {Datapath} from '../../src/loader/datapath.js';
import {POD_INBOUND, PORT_INBOUND_EXCLUDED, PORT_INBOUND_INCLUDED, PORT_OUTBOUND_EXCLUDED, PREFIX_LOCAL} from '../../src/maps/schema.js';
import {native} from '../../src/native.js';
import type {Entry} from './model.js';

/** What the kernel holds of a pod. */
export interface Held {
	readonly name: string;
	readonly cookie: bigint;
	readonly text: string;
}

/**
All pods that the kernel captures, by name.

@param isAlive - whether a namespace is there still.
@param isTorn - half of something may be there, as an agent left it that died.
@throws Error when something is there that is none's.
*/
export function readHeld(datapath: Datapath, isAlive: (cookie: bigint) => boolean, isTorn: boolean): ReadonlyMap<string, Held> {
	const {maps, rawMaps, layout} = datapath;
	const infos = new Map(maps.podInfo.entries());
	const pods = new Map(maps.pods.entries());
	const cookies = [...pods.keys()].sort().join();
	const same = (what: string, others: Iterable<bigint>) => {
		const text = [...others].sort().join();
		if (text !== cookies && !isTorn) {
			throw new Error(`${what} are of ${text}, pods of ${cookies}`);
		}
	};

	same('descriptions', infos.keys());
	for (const name of ['counters', 'traffic'] as const) {
		const {keys, count} = rawMaps.get(name)!.entries();
		same(name, new BigUint64Array(keys.slice().buffer, 0, count));
	}

	const byPolicy = new Map([...pods].map(([cookie, {policy}]) => [policy, cookie]));
	const ports = maps.ports.entries();
	const prefixes = maps.prefixes.entries();
	const orphan = [...ports, ...prefixes, ...maps.exemptions.entries()].find(([{policy}]) => !byPolicy.has(policy));
	if ((orphan || byPolicy.size !== pods.size) && !isTorn) {
		throw new Error(`list entries of no pod's, or of two: ${JSON.stringify(orphan)}`);
	}

	const steered = new Set(datapath.steeredPods());
	const held = new Map<string, Held>();
	for (const [cookie, pod] of pods) {
		const info = infos.get(cookie);
		if (!info) {
			continue;
		}

		const isSteered = steered.delete(cookie);
		if (isSteered && !isTorn) {
			const link = native.openPinnedLink(layout.podLink(cookie));
			const {targetId} = link.info();
			link.close();
			if (targetId !== info.netnsInode && isAlive(cookie)) {
				throw new Error(`the link of ${info.name} is attached to ${targetId}, not ${info.netnsInode}`);
			}
		}

		const ips = [info.address4, info.address6].filter(Boolean);
		const own = new Set(prefixes.filter(([{policy, bits}, {flags}]) => policy === pod.policy && bits === 160 && flags & PREFIX_LOCAL).map(([{address}]) => address));
		const missing = ips.filter(ip => !own.has(ip));
		const portTexts = ports.filter(([{policy}]) => policy === pod.policy).map(([{port}, {flags}]) => `${port}${flags & PORT_INBOUND_EXCLUDED ? ' in' : ''}${flags & PORT_INBOUND_INCLUDED ? ' in+' : ''}${flags & PORT_OUTBOUND_EXCLUDED ? ' out' : ''}`).sort();
		const text = textOf({cookie, mode: info.mode, isSteered, flag: (pod.flags & POD_INBOUND) !== 0, hasDns: pod.dnsPort !== 0, ports: portTexts.join(', '), ips}) + (missing.length > 0 ? `, ${missing.join(', ')} not local` : '');
		if (held.has(info.name) && !isTorn) {
			throw new Error(`pod ${info.name} is there twice`);
		}

		held.set(info.name, {name: info.name, cookie, text});
	}

	if (steered.size > 0 && !isTorn) {
		throw new Error(`links of ${[...steered].join()}, which are no pods`);
	}

	return held;
}

/** By address. */
export function readAddresses({maps}: Datapath): readonly string[] {
	return maps.addresses.entries().map(([{address, bits}, cookie]) => `${address}/${bits} ${cookie}`).sort();
}

function textOf({cookie, mode, isSteered, flag, hasDns, ports, ips}: {readonly cookie: bigint; readonly mode: string; readonly isSteered: boolean; readonly flag: boolean; readonly hasDns: boolean; readonly ports: string; readonly ips: readonly string[]}): string {
	return `${mode} in ${cookie} as ${ips.join(', ')}${hasDns ? ', DNS' : ''}${isSteered ? ', steered' : ''}${flag ? ', inbound' : ''}, ports ${ports}`;
}

export function describe({space, mode, isSteered, hasDns, ports, ips}: Entry): string {
	const firsts = [ips.find(ip => !ip.includes(':')), ips.find(ip => ip.includes(':'))].filter(ip => ip !== undefined);
	return textOf({cookie: space.cookie, mode, isSteered, flag: isSteered, hasDns, ports, ips: firsts});
}

/** Each that can be told from the others once. */
export function unique(entries: ReadonlyArray<Entry | undefined>): ReadonlyArray<Entry | undefined> {
	return [...new Map(entries.map(entry => [entry && `${describe(entry)} ${entry.addresses.join()}`, entry])).values()];
}
