/**
A host as its /proc shows it to the agent: processes with cgroups, start times and network namespaces, and no process behind any of them. The namespaces are real, and few: each is one
pod's after another's.
*/
import {existsSync, mkdirSync, mkdtempSync, rmSync, rmdirSync, symlinkSync, unlinkSync, writeFileSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {addressToBytes, isIpv4Address} from '../../src/maps/address.js';
import {KEPT_SOURCE_MARK, KEPT_SOURCE_MASK} from '../../src/maps/schema.js';
import {native, type NetNs} from '../../src/native.js';
import {run} from './process.js';

const NETNS_DIRECTORY = '/run/netns';
const TABLE = 100;
const PRIORITY = 32_764;
const SWITCHES = ['net/ipv4/tcp_fwmark_accept', 'net/ipv4/fwmark_reflect', 'net/ipv6/fwmark_reflect'] as const;
export const ACCEPT = SWITCHES[0];

/** How /proc/PID/cgroup looks for a container, by driver and hierarchy. */
const CGROUP_TEXTS: ReadonlyArray<(uid: string, id: string) => string> = [
	(uid, id) => `0::/kubepods/burstable/pod${uid}/${id}\n`,
	(uid, id) => `0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod${uid.replaceAll('-', '_')}.slice/cri-containerd-${id}.scope\n`,
	(uid, id) => `0::/kubepods.slice/kubepods-pod${uid.replaceAll('-', '_')}.slice/crio-${id}.scope/container\n`,
	(uid, id) => `11:memory:/kubepods/besteffort/pod${uid}/${id}\n4:cpu,cpuacct:/kubepods/besteffort/pod${uid}/${id}\n1:name=systemd:/kubepods/besteffort/pod${uid}/${id}\n0::/\n`,
	(uid, id) => `0::/../../kubelet-kubepods-pod${uid.replaceAll('-', '_')}.slice:cri-containerd:${id}/pod${uid}/pod11111111-2222-3333-4444-555555555555/inner\n`,
];

/** A network namespace that pods take in turn. */
export interface Space {
	readonly netns: NetNs;
	readonly cookie: bigint;
	/** Whose it is when nobody gives it others; both families. */
	readonly home: readonly string[];
	/** What eth0 has now. */
	readonly addresses: Set<string>;
}

export interface HostProcess {
	readonly pid: number;
	/** Of the pod in its cgroup's name; '' for a process of no pod. */
	readonly uid: string;
	/** Undefined: the host's own. */
	readonly space: Space | undefined;
	readonly startedAt: number;
}

/** What the agent may have changed in a namespace, in words. */
export type Settings = ReadonlySet<string>;

export class FakeHost {
	readonly proc: string;
	readonly processes = new Map<number, HostProcess>();
	/** Names below /run/netns. */
	readonly files = new Map<string, Space>();
	readonly #free: Space[];
	/** Which namespace a pid was last seen in: a pid that comes again never shows the same one to who remembers it. */
	readonly #last = new Map<number, Space | undefined>();
	#pid = 100;
	#ticks = 1000;
	#names = 0;

	private constructor(readonly id: string, readonly spaces: readonly Space[]) {
		// In memory, where there is such a place: as /proc is.
		this.proc = mkdtempSync(path.join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), `${id}-proc-`));
		this.#free = [...spaces];
		mkdirSync(path.join(this.proc, '1/ns'), {recursive: true});
		symlinkSync('/proc/1/ns/net', path.join(this.proc, '1/ns/net'));
		symlinkSync('/proc/sys', path.join(this.proc, 'sys'));
	}

	/** @param id - begins the names below /run/netns. */
	static create(t: {teardown(clean: () => void): void}, id: string, count: number): FakeHost {
		const spaces: Space[] = [];
		const names = Array.from({length: count}, (_, index) => path.join(NETNS_DIRECTORY, `${id}-${index}`));
		let host: FakeHost | undefined;
		t.teardown(() => {
			for (const file of [...names, ...host?.files.keys() ?? []]) {
				rmSync(file, {force: true});
			}

			for (const {netns} of spaces) {
				netns.close();
			}

			if (host) {
				rmSync(host.proc, {recursive: true, force: true});
			}
		});
		mkdirSync(NETNS_DIRECTORY, {recursive: true});
		for (const [index, name] of names.entries()) {
			const netns = native.createNetns();
			const home = [`10.80.${index >> 8}.${index & 255}`, `fd80::${(index + 1).toString(16)}`];
			spaces.push({netns, cookie: netns.cookie(), home, addresses: new Set()});
			symlinkSync(fdPath(netns), name);
		}

		const batch = names.map(name => `link add eth0 netns ${path.basename(name)} type veth peer name other netns ${path.basename(name)}\n`).join('');
		const {code, stderr} = run('ip', ['-batch', '-'], {input: batch});
		if (code !== 0) {
			throw new Error(`interfaces cannot be made: ${stderr}`);
		}

		for (const [index, space] of spaces.entries()) {
			unlinkSync(names[index]!);
			space.netns.setUp('lo');
			space.netns.setUp('eth0');
		}

		host = new FakeHost(id, spaces);
		for (const space of spaces) {
			host.setAddresses(space, space.home);
		}

		return host;
	}

	get free(): number {
		return this.#free.length;
	}

	/** A namespace that nobody has, with its own addresses. */
	take(): Space {
		const space = this.#free.shift();
		if (!space) {
			throw new Error('no namespace is left: a pod that is gone still has one');
		}

		return space;
	}

	/** Nobody has it any more. */
	giveBack(space: Space): void {
		this.#free.push(space);
	}

	setAddresses(space: Space, addresses: readonly string[]): void {
		for (const address of [...space.addresses].filter(address => !addresses.includes(address))) {
			space.netns.changeAddress('delete', addressOn(address, 'eth0'));
			space.addresses.delete(address);
		}

		for (const address of addresses.filter(address => !space.addresses.has(address))) {
			space.netns.changeAddress('add', addressOn(address, 'eth0'));
			space.addresses.add(address);
		}
	}

	/** @param form - how its cgroup is written. */
	start(uid: string, space: Space | undefined, form: number, startedAt = ++this.#ticks): HostProcess {
		do {
			this.#pid = this.#pid === 900 ? 101 : this.#pid + 1;
		} while (this.processes.has(this.#pid) || (this.#last.has(this.#pid) && this.#last.get(this.#pid) === space));

		const process = {pid: this.#pid, uid, space, startedAt};
		const directory = path.join(this.proc, String(process.pid));
		mkdirSync(path.join(directory, 'ns'), {recursive: true});
		symlinkSync(space ? fdPath(space.netns) : '/proc/1/ns/net', path.join(directory, 'ns/net'));
		writeFileSync(path.join(directory, 'stat'), `${process.pid} (a) b (c) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 ${startedAt} 0 0\n`);
		writeFileSync(path.join(directory, 'cgroup'), uid === '' ? '0::/system.slice/sshd.service\n' : CGROUP_TEXTS[form % CGROUP_TEXTS.length]!(uid, `${'c0ffee'.repeat(10)}${process.pid}`));
		this.processes.set(process.pid, process);
		return process;
	}

	end({pid, space}: HostProcess): void {
		this.#last.set(pid, space);
		this.processes.delete(pid);
		const directory = path.join(this.proc, String(pid));
		for (const file of ['cgroup', 'stat', 'ns/net']) {
			unlinkSync(path.join(directory, file));
		}

		rmdirSync(path.join(directory, 'ns'));
		rmdirSync(directory);
	}

	/** As a container runtime keeps a sandbox's namespace. @returns its path. */
	nameSpace(space: Space): string {
		const file = path.join(NETNS_DIRECTORY, `${this.id}-cni-${++this.#names}`);
		symlinkSync(fdPath(space.netns), file);
		this.files.set(file, space);
		return file;
	}

	unnameSpace(file: string): void {
		unlinkSync(file);
		this.files.delete(file);
	}

	/** It lives: a process is in it, or it has a name. */
	isAlive(space: Space): boolean {
		return [...this.files.values()].includes(space) || [...this.processes.values()].some(process => process.space === space);
	}

	settings({netns}: Space): Settings {
		const switches = netns.sysctls('/proc', SWITCHES);
		return new Set([
			...netns.rules().filter(({mark}) => mark === KEPT_SOURCE_MARK).map(({family}) => `rule ${family}`),
			...netns.routes().filter(({table}) => table === TABLE).map(({family}) => `route ${family}`),
			...SWITCHES.filter((_, index) => switches[index] === '1'),
			...netns.addresses().some(({address, isLoopback}) => isLoopback && address.length === 16 && Buffer.compare(address, addressToBytes('::6')) === 0) ? ['::6'] : [],
		]);
	}

	/** Takes back all that an agent may have changed in it. */
	clear(space: Space): void {
		const {netns} = space;
		const settings = this.settings(space);
		for (const family of [4, 6] as const) {
			if (settings.has(`rule ${family}`)) {
				netns.changeRule('delete', {family, priority: PRIORITY, table: TABLE, mark: KEPT_SOURCE_MARK, mask: KEPT_SOURCE_MASK});
			}

			if (settings.has(`route ${family}`)) {
				netns.changeLocalRoute('delete', {address: new Uint8Array(family === 4 ? 4 : 16), prefixLength: 0, interfaceName: 'lo', table: TABLE});
			}
		}

		for (const name of SWITCHES.filter(name => settings.has(name))) {
			netns.setSysctl('/proc', name, '0');
		}

		if (settings.has('::6')) {
			netns.changeAddress('delete', addressOn('::6', 'lo'));
		}
	}
}

const fdPath = ({fd}: NetNs) => `/proc/${process.pid}/fd/${fd}`;

function addressOn(address: string, interfaceName: string) {
	const bytes = addressToBytes(address);
	return isIpv4Address(address) ? {address: bytes.subarray(12), prefixLength: 32, interfaceName} : {address: bytes, prefixLength: 128, interfaceName};
}
