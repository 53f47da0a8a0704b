/**
What this host can do, found out by use and never by version: distributions backport, and kernels are configured.
*/
import {existsSync, readFileSync} from 'node:fs';
import {HostError, hasErrno, reasonOf} from '../errors.js';
import {addressFromBytes, addressToBytes} from '../maps/address.js';
import {MAP_NAMES, type MapName, type Target} from '../maps/schema.js';
import {native, type BpfLink, type BpfMap} from '../native.js';
import {probeAcceleration} from './acceleration-probe.js';
import {CGROUP_PROGRAMS, PROGRAMS} from './datapath.js';
import {findCgroup2, isBpffs, missingCapabilities, ownCgroup, resolveCgroup} from './host.js';
import {openObject} from './object.js';

export interface Finding {
	readonly name: string;
	/** `missing`: capture cannot work. `degraded`: it works, with what `detail` says. */
	readonly state: 'ok' | 'degraded' | 'missing';
	readonly detail: string;
}

const AF_INET = 2;
const AF_INET6 = 10;
const SOCK_STREAM = 1;
const SOL_IP = 0;
const SOL_IPV6 = 41;
const SO_ORIGINAL_DST = 80;
const IPV6_V6ONLY = 26;
/** enum bpf_prog_type. */
const SOCKMAP_PROGRAM_TYPES: ReadonlyMap<number, string> = new Map([[13, 'sock_ops'], [14, 'sk_skb'], [16, 'sk_msg']]);
/** enum bpf_map_type: sockmap, sockhash. */
const SOCKMAP_TYPES = [15, 18];

/** Everything `sidestep check` shows, in the order in which a failure explains the later ones. */
export function checkHost(options: {readonly bpffs: string; readonly cgroup?: string | undefined}): readonly Finding[] {
	const findings: Finding[] = [];
	const probe = (name: string, act: () => Omit<Finding, 'name'>) => {
		try {
			findings.push({name, ...act()});
		} catch (error) {
			findings.push({name, state: 'missing', detail: reasonOf(error)});
		}
	};

	probe('capabilities', () => {
		const missing = missingCapabilities();
		return missing.length === 0 ? {state: 'ok', detail: 'all that are needed'} : {state: 'missing', detail: `this process lacks ${missing.join(', ')}: run as root, or give the container these`};
	});
	probe('kernel BTF', () => existsSync('/sys/kernel/btf/vmlinux')
		? {state: 'ok', detail: '/sys/kernel/btf/vmlinux'}
		: {state: 'missing', detail: 'no /sys/kernel/btf/vmlinux: the kernel needs CONFIG_DEBUG_INFO_BTF=y'});
	probe('cgroup v2', () => ({state: 'ok', detail: `attaching to ${resolveCgroup(options.cgroup)} (mounted at ${findCgroup2()})`}));
	probe('bpffs', () => isBpffs(options.bpffs)
		? {state: 'ok', detail: `mounted at ${options.bpffs}`}
		: {state: 'ok', detail: `not mounted at ${options.bpffs}; \`sidestep run\` mounts it`});
	probe('netns cookie', () => {
		const netns = native.createNetns();
		try {
			return {state: 'ok', detail: `SO_NETNS_COOKIE, e.g. ${netns.cookie()}`};
		} catch (error) {
			if (hasErrno(error, 'ENOPROTOOPT')) {
				return {state: 'missing', detail: 'the kernel does not know SO_NETNS_COOKIE, nor bpf_get_netns_cookie in sock_ops programs: 5.15 or newer is needed'};
			}

			throw error;
		} finally {
			netns.close();
		}
	});
	findings.push(...selfTest());
	probe('acceleration', () => {
		const {oneQueue, findings: tried} = probeAcceleration();
		const failures = tried.filter(({failure}) => failure !== undefined).map(({name, failure}) => `${name} (${failure})`);
		return oneQueue === undefined
			? {state: 'degraded', detail: `auto stays off: ${failures.join('; ')}`}
			: {state: 'ok', detail: `${tried.length} probes passed${oneQueue ? '' : ', with two queues'}`};
	});
	probe('run statistics', () => {
		const path = '/proc/sys/kernel/bpf_stats_enabled';
		return existsSync(path) && readFileSync(path, 'utf8').trim() === '1'
			? {state: 'ok', detail: 'run counts and times are in the metrics'}
			: {state: 'degraded', detail: 'run counts and times are 0 in the metrics: sysctl kernel.bpf_stats_enabled=1 turns them on (about 20 ns a run)'};
	});
	probe('other programs', () => {
		const others = foreignPrograms(resolveCgroup(options.cgroup));
		return {state: 'ok', detail: others.length === 0 ? 'none on these hooks of this cgroup' : `on the same hooks, run beside ours: ${others.join(', ')}`};
	});
	probe('other sockmaps', () => {
		const others = foreignSockmapPrograms();
		return others.length === 0 ? {state: 'ok', detail: 'none on this host'}
			: {state: 'degraded', detail: `what these hold cannot be accelerated (counted unaccelerated_busy): ${others.join(', ')}`};
	});
	return findings;
}

/** @throws HostError with every finding that is `missing`. */
export function requireWorkingCapture(): void {
	const broken = selfTest().filter(({state}) => state === 'missing');
	if (broken.length > 0) {
		throw new HostError(broken.map(({name, detail}) => `${name}: ${detail}`).join('; '), 'see `sidestep check`');
	}
}

/** Names of programs that others attached to the hooks we use. */
function foreignPrograms(cgroup: string): readonly string[] {
	const {object} = openObject();
	const attachTypes = object.programs().filter(({name}) => (CGROUP_PROGRAMS as readonly string[]).includes(name)).map(({attachType}) => attachType);
	object.close();
	const ours = new Set<string>(PROGRAMS);
	const names = attachTypes.flatMap(type => native.cgroupPrograms(cgroup, type)).map(id => {
		const program = native.openProgramById(id);
		const {name} = program.info();
		program.close();
		return {id, name};
	});
	return names.filter(({name}) => !ours.has(name)).map(({id, name}) => `${name || 'unnamed'} (program ${id})`);
}

/** Programs of others, anywhere on the host, that hang on a sockmap or put sockets into one; a socket can be in the maps of one user only. */
function foreignSockmapPrograms(): readonly string[] {
	const ours = new Set<string>(PROGRAMS);
	return native.ids('program').flatMap(id => {
		try {
			const program = native.openProgramById(id);
			const {name, type, mapIds} = program.info();
			program.close();
			const kind = SOCKMAP_PROGRAM_TYPES.get(type);
			return kind === undefined || ours.has(name) || (kind === 'sock_ops' && !mapIds.some(isSockmap)) ? [] : `${name || 'unnamed'} (${kind}, program ${id})`;
		} catch (error) {
			// It was unloaded meanwhile.
			if (hasErrno(error, 'ENOENT')) {
				return [];
			}

			throw error;
		}
	});
}

function isSockmap(id: number): boolean {
	const map = native.openMapById(id);
	const {type} = map.info();
	map.close();
	return SOCKMAP_TYPES.includes(type);
}

/**
Captures real connections: this build's own programs with maps of their own, attached for a few milliseconds to the cgroup of this process only, in a
network namespace made for it.
*/
export function selfTest(): readonly Finding[] {
	const findings: Finding[] = [];
	const cleanup: Array<() => void> = [];
	const check = (name: string, act: () => Partial<Omit<Finding, 'name'>> | void) => {
		try {
			findings.push({name, state: 'ok', detail: 'works', ...act()});
		} catch (error) {
			findings.push({name, state: 'missing', detail: reasonOf(error)});
		}
	};

	try {
		const {object, schema} = openObject();
		cleanup.push(() => object.close());
		check('programs', () => {
			object.load();
			return {detail: `${PROGRAMS.length} are accepted by the verifier`};
		});
		if (findings.at(-1)!.state === 'missing') {
			return findings;
		}

		const raw = new Map<MapName, BpfMap>(MAP_NAMES.map(name => [name, object.map(name)]));
		cleanup.push(() => {
			for (const map of raw.values()) {
				map.close();
			}
		});
		const maps = schema.maps(name => raw.get(name)!);
		const netns = native.createNetns();
		cleanup.push(() => netns.close());
		netns.setUp('lo');
		check('attach', () => {
			const cgroup = ownCgroup();
			for (const name of CGROUP_PROGRAMS) {
				const program = object.program(name);
				const link: BpfLink = program.attachCgroup(cgroup);
				program.close();
				cleanup.push(() => link.close());
			}

			const inbound = object.program('inbound');
			const link = inbound.attachNetns(netns.fd);
			inbound.close();
			cleanup.push(() => link.close());
			return {detail: 'cgroup links and a namespace link'};
		});
		if (findings.at(-1)!.state === 'missing') {
			return findings;
		}

		const cookie = netns.cookie();
		const listener = netns.socket(AF_INET6, SOCK_STREAM, 0);
		cleanup.push(() => native.closeFd(listener));
		native.setsockopt(listener, SOL_IPV6, IPV6_V6ONLY, new Uint8Array(4));
		native.bind(listener, socketAddress('', 0, true));
		native.listen(listener, 8);
		const {port} = parseSocketAddress(native.getsockname(listener));
		const target = (address: string): Target => ({address, source: '', port, inPod: 1, spread: 0});
		const enrol = (target4: Target, target6: Target) => {
			maps.pods.set(cookie, {
				policy: 1, flags: 0, exemptCgroupLevels: 0, markCount: 0, marks: Array.from({length: 4}, () => ({value: 0, mask: 0})),
				proxyUid: 0, proxyGid: 0, inboundPort: 0, dnsPort: 0, target4, target6,
			});
		};

		enrol(target('127.0.0.1'), target('::1'));
		const captured = (destination: string, v6Socket: boolean) => () => {
			const client = netns.socket(v6Socket ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
			let accepted: number | undefined;
			try {
				native.connect(client, socketAddress(destination, 80, v6Socket));
				accepted = native.accept(listener);
				const ipv4 = !destination.includes(':');
				const answer = native.getsockopt(accepted, ipv4 ? SOL_IP : SOL_IPV6, SO_ORIGINAL_DST, ipv4 ? 16 : 28);
				expect('SO_ORIGINAL_DST', parseSocketAddress(answer), destination);
				expect('getpeername', parseSocketAddress(native.getpeername(client)), destination);
			} finally {
				native.closeFd(client);
				if (accepted !== undefined) {
					native.closeFd(accepted);
				}
			}
		};

		check('capture of IPv4', captured('127.0.0.2', false));
		check('capture of IPv6', captured('2001:db8::1', true));
		check('capture of IPv4 on IPv6 sockets', captured('127.0.0.2', true));
		check('refusal', () => {
			enrol({...target('127.0.0.1'), address: ''}, {...target('::1'), address: ''});
			const client = netns.socket(AF_INET, SOCK_STREAM, 0);
			try {
				native.connect(client, socketAddress('127.0.0.2', 80, false));
			} catch (error) {
				const {code} = error as NodeJS.ErrnoException;
				return code === 'EPERM'
					? {state: 'degraded', detail: 'a connection that has to be refused shows EPERM (bpf_set_retval is missing, 5.18)'}
					: {detail: `a connection that has to be refused shows ${code}`};
			} finally {
				native.closeFd(client);
			}

			throw new Error('a connection that had to be refused went through');
		});
	} catch (error) {
		findings.push({name: 'self-test', state: 'missing', detail: reasonOf(error)});
	} finally {
		for (const undo of cleanup.reverse()) {
			undo();
		}
	}

	return findings;
}

function expect(what: string, got: {address: string; port: number}, address: string): void {
	if (got.address !== address || got.port !== 80) {
		throw new Error(`${what} gave ${got.address}:${got.port} instead of ${address}:80`);
	}
}

/** struct sockaddr_in, or sockaddr_in6 for an IPv6 socket; '' is the wildcard. */
function socketAddress(address: string, port: number, v6Socket: boolean): Uint8Array {
	const bytes = new Uint8Array(v6Socket ? 28 : 16);
	const view = new DataView(bytes.buffer);
	view.setUint16(0, v6Socket ? AF_INET6 : AF_INET, true);
	view.setUint16(2, port);
	const all = addressToBytes(address);
	bytes.set(v6Socket ? all : all.subarray(12), v6Socket ? 8 : 4);
	return bytes;
}

function parseSocketAddress(bytes: Uint8Array): {address: string; port: number} {
	const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
	const v6 = view.getUint16(0, true) === AF_INET6;
	return {address: addressFromBytes(v6 ? bytes.subarray(8, 24) : bytes.subarray(4, 8)), port: view.getUint16(2)};
}
