/**
Which network namespace a pod has: told by the CNI call, or found through the host's /proc by the pod's uid in the cgroup of its processes.
*/
import {readFileSync, readdirSync} from 'node:fs';
import path from 'node:path';
import {NowhereError, PodError} from '../errors.js';
import {addressFromBytes} from '../maps/address.js';
import {native, type NetNs} from '../native.js';
import {isHostNetns, reopenNetns, scanNetns, type NetnsFile, type NetnsIdentity} from '../pods/facts.js';

/** One look at all processes serves all pods that are looked for soon after; and for longer those that it found, as each is looked at again. */
const SCAN_AGE_MS = 200;
const FOUND_AGE_MS = 5000;
/**
The directory of a pod below kubepods: `pod<uid>` (cgroupfs), `…-pod<uid>.slice` (systemd, which has _ for -). A static pod's uid is a hash without dashes. The outermost one counts: what a
pod runs inside of itself is the pod's.
*/
const POD_CGROUP = /[/-]pod([\da-f]{8}(?:[-_][\da-f]{4}){3}[-_][\da-f]{12}|[\da-f]{32})(?=[./]|$)/m;

/** As the cgroup's name has it. */
export interface LocatedPod {
	/** namespace/name. */
	readonly name: string;
	/** Of the API's object; and that of the file it was made from, for a static pod. */
	readonly uids: readonly string[];
	/** All have to be in the namespace; none when they are not known yet. */
	readonly ips: readonly string[];
}

export class Locator {
	readonly #known = new Map<string, NetnsFile>();
	#processes: {readonly at: number; readonly byUid: ReadonlyMap<string, readonly string[]>} | undefined;

	/**
	@param proc - the host's /proc.
	@param former - where a pod of this name is captured, as the kernel's maps remember: for a pod that has no process now.
	*/
	constructor(readonly proc: string, readonly former: (name: string) => NetnsIdentity | undefined) {}

	/**
	What the CNI call said.

	@throws PodError when there is no such namespace, or it is the host's.
	*/
	learn(name: string, uid: string, file: string): void {
		let netns: NetNs;
		try {
			netns = native.openNetns(file);
		} catch (error) {
			throw new PodError(name, `its network namespace ${file} cannot be opened by the agent: mount the host's directory of namespaces with HostToContainer propagation`, {cause: error});
		}

		try {
			if (isHostNetns(netns, this.proc)) {
				throw new PodError(name, 'its network namespace is the host\'s own, which is never captured');
			}

			this.#known.set(uid, {path: file, device: netns.device, inode: netns.inode});
		} finally {
			netns.close();
		}
	}

	/** Whether that is the namespace that was learned or found last. */
	isAt(uid: string, {device, inode}: NetnsIdentity): boolean {
		const known = this.#known.get(uid);
		return known?.device === device && known.inode === inode;
	}

	forget(uid: string): void {
		this.#known.delete(uid);
	}

	/** Whether {@link learn} or {@link find} found it, and it is still there. */
	knows(uid: string): boolean {
		const file = this.#known.get(uid);
		const netns = file && reopenNetns(file);
		netns?.close();
		return netns !== undefined;
	}

	/**
	@returns the namespace's file.
	@throws NowhereError when there is none.
	*/
	find(pod: LocatedPod): string {
		const [uid] = pod.uids;
		const known = this.#known.get(uid!);
		// A process may stay behind in the namespace of a sandbox that is gone.
		if (known && isThere(known, pod.ips)) {
			return known.path;
		}

		let pids: readonly string[] = [];
		let file: NetnsFile | undefined;
		for (const maxAgeMs of [FOUND_AGE_MS, SCAN_AGE_MS]) {
			if (!file) {
				const processes = this.#podProcesses(maxAgeMs);
				pids = pod.uids.flatMap(id => processes.get(id) ?? []);
				file = this.#firstOf(pids, pod.ips);
			}
		}

		file ??= this.#former(pod);
		if (!file && this.knows(uid!)) {
			return known!.path;
		}

		this.#known.delete(uid!);
		if (!file) {
			throw new NowhereError(pod.name, pids.length === 0
				? `no process of it is found below ${this.proc}: it is not started yet, or its cgroup does not have its uid ${uid}`
				: `none of its ${pids.length} processes has a network namespace with its address ${pod.ips.join(', ')}`);
		}

		this.#known.set(uid!, file);
		return file.path;
	}

	/** The oldest process's whose namespace is the pod's: what a container unshares by itself is none. */
	#firstOf(pids: readonly string[], ips: readonly string[]): NetnsFile | undefined {
		const seen = new Set<string>();
		for (const pid of [...pids].sort((a, b) => startTime(this.proc, a) - startTime(this.proc, b))) {
			const file = path.join(this.proc, pid, 'ns/net');
			let netns: NetNs;
			try {
				netns = native.openNetns(file);
			} catch {
				// It ended meanwhile.
				continue;
			}

			try {
				const id = `${netns.device} ${netns.inode}`;
				if (!seen.has(id) && !isHostNetns(netns, this.proc) && hasAddresses(netns, ips)) {
					return {path: file, device: netns.device, inode: netns.inode};
				}

				seen.add(id);
			} finally {
				netns.close();
			}
		}

		return undefined;
	}

	#former({name, ips}: LocatedPod): NetnsFile | undefined {
		const identity = this.former(name);
		const found = identity && scanNetns(this.proc).files(identity).map(file => ({path: file, ...identity}));
		return found?.find(file => isThere(file, ips));
	}

	#podProcesses(maxAgeMs: number): ReadonlyMap<string, readonly string[]> {
		if (!this.#processes || performance.now() - this.#processes.at > maxAgeMs) {
			this.#processes = {byUid: podProcesses(this.proc), at: performance.now()};
		}

		return this.#processes.byUid;
	}
}

/** Pids by pod uid, with dashes as the API has them. */
export function podProcesses(proc: string): ReadonlyMap<string, readonly string[]> {
	const byUid = new Map<string, string[]>();
	for (const pid of readdirSync(proc)) {
		if (!/^\d+$/.test(pid)) {
			continue;
		}

		let text: string;
		try {
			text = readFileSync(path.join(proc, pid, 'cgroup'), 'utf8');
		} catch {
			// It ended meanwhile.
			continue;
		}

		const uid = podUidOf(text);
		if (uid !== undefined) {
			byUid.set(uid, [...byUid.get(uid) ?? [], pid]);
		}
	}

	return byUid;
}

/** @param cgroups - /proc/PID/cgroup: lines of all hierarchies. */
export function podUidOf(cgroups: string): string | undefined {
	return POD_CGROUP.exec(cgroups)?.[1]!.replaceAll('_', '-');
}

/** It is the same namespace still, and has the addresses. */
function isThere(file: NetnsFile, ips: readonly string[]): boolean {
	const netns = reopenNetns(file);
	try {
		return netns !== undefined && hasAddresses(netns, ips);
	} finally {
		netns?.close();
	}
}

function hasAddresses(netns: NetNs, ips: readonly string[]): boolean {
	const there = new Set(netns.addresses().map(({address}) => addressFromBytes(address)));
	return ips.every(ip => there.has(ip));
}

/** In clock ticks since boot; field 22 of /proc/PID/stat, whose second field may contain blanks and brackets. */
function startTime(proc: string, pid: string): number {
	try {
		const text = readFileSync(path.join(proc, pid, 'stat'), 'utf8');
		return Number(text.slice(text.lastIndexOf(')') + 2).split(' ')[19]);
	} catch {
		return Number.MAX_SAFE_INTEGER;
	}
}
