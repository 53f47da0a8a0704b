/**
A private world for one test: network namespaces that a bridge connects, a cgroup, a bpffs. The host's own namespace is never changed. Everything goes
with the test, whatever happens to it; what a killed test run left behind goes with the next one.
*/
import {chmodSync, copyFileSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, rmdirSync, writeFileSync} from 'node:fs';
import {once} from 'node:events';
import {get, type IncomingMessage} from 'node:http';
import {text} from 'node:stream/consumers';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import {findCgroup2} from '../../src/loader/host.js';
import {native} from '../../src/native.js';
import {Running, eventually, must, run, type Result} from './process.js';

const ROOT = fileURLToPath(new URL('../../../', import.meta.url));
const PREFIX = 'sst';
/** The helper programs; each world has copies that other users can run, as the tree itself may be closed to them. */
const BIN = path.join(ROOT, 'build/test');
const PROGRAMS = ['in', 'client', 'server', 'proxy', 'ztunnel', 'dns', 'dnsserver', 'flows', 'acceptor', 'connector', 'relay', 'traffic'] as const;
export const CLI = path.join(ROOT, 'dist/src/cli/main.js');
export const ENVOY = path.join(ROOT, '.cache/envoy/envoy');

export interface ClientResult {
	readonly to: string;
	readonly outcome: string;
	readonly stage: string;
	readonly local: string;
	readonly peer: string;
	readonly original_dst: {readonly ip: string; readonly ipv6: string};
	readonly hello: {readonly server: string; readonly peer: string} | null;
	readonly echo: boolean;
	readonly connect_us: number;
}

export interface ManyResult {
	readonly ok: number;
	readonly failed: number;
	readonly wrong_peer: number;
	readonly errors: Readonly<Record<string, number>>;
}

export interface ProxyLine {
	readonly peer: string;
	readonly local: string;
	readonly original_dst: string | null;
	readonly answers: ReadonlyArray<{readonly level: string; readonly length: number; readonly result: string; readonly returned?: number; readonly bytes?: string}>;
}

export interface ZtunnelLine {
	readonly listener: number;
	readonly protocol: 'tcp' | 'udp';
	readonly peer: string;
	readonly local: string;
	/** Empty where it was not asked for. */
	readonly original_dst: string;
	/** Who knew the original destination. */
	readonly from: 'ip' | 'ipv6' | 'sockname' | '';
	/** Empty when nothing was connected to. */
	readonly upstream_local: string;
}

export interface DnsResult {
	readonly to: string;
	readonly outcome: string;
	/** Empty over TCP. */
	readonly answer_from: string;
	readonly peer: string;
	readonly local: string;
	readonly answer: {readonly server: string; readonly peer: string} | null;
}

export interface As {
	readonly uid?: number;
	readonly gid?: number;
	readonly cgroup?: string;
}

let worlds = 0;

export class World {
	readonly id = `${PREFIX}-${process.pid}-${++worlds}`;
	readonly directory: string;
	readonly bpffs: string;
	readonly cgroup: string;
	/** The node's own namespace: 10.77.0.1 and fd77::1 on the bridge. */
	readonly node: Pod;
	readonly #undo: Array<() => void | Promise<void>> = [];
	#pods = 0;

	private constructor() {
		if (process.getuid?.() !== 0) {
			throw new Error('kernel tests need root: run them as root');
		}

		sweep();
		this.directory = mkdtempSync(path.join(tmpdir(), `${this.id}-`));
		// Proxies read their configuration as another user.
		chmodSync(this.directory, 0o755);
		this.bpffs = path.join(this.directory, 'bpf');
		this.cgroup = path.join(findCgroup2()!, this.id);
		this.node = new Pod(this, 'node', `${this.id}-node`, '10.77.0.1', 'fd77::1');
	}

	/** @param t - a test, or whatever else cleans up at its end. */
	static create(t: {teardown(clean: () => void | Promise<void>): void}): World {
		const world = new World();
		const clean = async () => world.#clean();
		t.teardown(clean);
		world.#undo.push(() => {
			rmSync(world.directory, {recursive: true, force: true});
		});
		for (const program of PROGRAMS) {
			copyFileSync(path.join(BIN, program), world.program(program));
		}

		mkdirSync(world.bpffs);
		native.mountBpffs(world.bpffs);
		world.#undo.push(() => {
			native.unmount(world.bpffs);
		});
		mkdirSync(world.cgroup);
		world.#undo.push(async () => removeCgroup(world.cgroup));
		world.#makeNode();
		return world;
	}

	program(name: typeof PROGRAMS[number]): string {
		return path.join(this.directory, name);
	}

	onEnd(undo: () => void | Promise<void>): void {
		this.#undo.push(undo);
	}

	/** A directory below the world's cgroup. */
	subCgroup(name: string): string {
		const directory = path.join(this.cgroup, name);
		mkdirSync(directory);
		this.#undo.push(async () => removeCgroup(directory));
		return directory;
	}

	/** A namespace with eth0 on the bridge: 10.77.0.N and fd77::N, further addresses by `more`. */
	pod(name: string, options: {readonly more?: readonly string[]; readonly ipv4?: boolean; readonly ipv6?: boolean} = {}): Pod {
		const number = ++this.#pods + 1;
		const netns = `${this.id}-${name}`;
		this.#netns(netns);
		must('ip', 'link', 'add', 'eth0', 'netns', netns, 'type', 'veth', 'peer', 'name', `v${number}`, 'netns', this.node.netnsName);
		must('ip', '-n', this.node.netnsName, 'link', 'set', `v${number}`, 'master', 'br0', 'up');
		// A link-local address would come a second or two later, when its uniqueness is known, and change the pod under the test.
		must('ip', '-n', netns, 'link', 'set', 'eth0', 'addrgenmode', 'none');
		const ipv4 = options.ipv4 === false ? '' : `10.77.0.${number}`;
		const ipv6 = options.ipv6 === false ? '' : `fd77::${number.toString(16)}`;
		for (const address of [ipv4, ipv6, ...options.more ?? []].filter(Boolean)) {
			must('ip', '-n', netns, 'addr', 'add', address.includes(':') ? `${address}/64` : `${address}/24`, 'dev', 'eth0', ...(address.includes(':') ? ['nodad'] : []));
		}

		must('ip', '-n', netns, 'link', 'set', 'eth0', 'up');
		if (ipv4) {
			must('ip', '-n', netns, 'route', 'add', 'default', 'via', '10.77.0.1');
		}

		if (ipv6) {
			must('ip', '-n', netns, '-6', 'route', 'add', 'default', 'via', 'fd77::1');
		}

		return new Pod(this, name, netns, ipv4, ipv6);
	}

	/** `sidestep …`, to its end. */
	sidestep(...args: readonly string[]): Result {
		return run(process.execPath, [CLI, ...args, ...(args[0] === 'run' || args.includes('--bpffs') ? [] : ['--bpffs', this.bpffs])]);
	}

	/** `sidestep …`, in the background. */
	startSidestep(...args: readonly string[]): Running {
		const running = Running.start(process.execPath, [CLI, ...args, '--bpffs', this.bpffs]);
		this.#undo.push(async () => {
			await running.stop('SIGKILL');
		});
		return running;
	}

	json<T>(...args: readonly string[]): T {
		const {code, stdout, stderr} = this.sidestep(...args, '-o', 'json');
		if (code !== 0) {
			throw new Error(`sidestep ${args.join(' ')}: ${stderr}`);
		}

		return JSON.parse(stdout) as T;
	}

	get podsFile(): string {
		return path.join(this.directory, 'pods.yaml');
	}

	/** Replaces the pods file; JSON is YAML. */
	writePods(pods: readonly object[]): void {
		writeFileSync(this.podsFile, JSON.stringify({pods}));
	}

	/** `sidestep run` on the world's cgroup and bpffs, ready. */
	async agent(pods: readonly object[], extra: readonly string[] = []): Promise<Agent> {
		this.writePods(pods);
		const agent = this.startAgent(extra);
		await agent.ready();
		return agent;
	}

	/** @param wrapper - a command that runs the agent's. */
	startAgent(extra: readonly string[] = [], wrapper: readonly string[] = []): Agent {
		const running = Running.start(this.program('in'), ['--cgroup', this.cgroup, '--', ...wrapper, process.execPath, CLI, 'run', '--pods-file', this.podsFile, '--bpffs', this.bpffs, '--cgroup', this.cgroup, '--node-netns', this.node.netns, '--metrics-address', '127.0.0.1:0', ...extra]);
		this.#undo.push(async () => {
			await running.stop('SIGKILL');
		});
		return new Agent(running);
	}

	#makeNode(): void {
		const node = this.node.netnsName;
		this.#netns(node);
		// A neighbour is asked for from the link-local address where the packet's own source is not the node's (SNAT), and only once that address is known to be unique.
		must('ip', 'netns', 'exec', node, 'sysctl', '-qw', 'net.ipv6.conf.default.accept_dad=0');
		must('ip', '-n', node, 'link', 'add', 'br0', 'type', 'bridge');
		must('ip', '-n', node, 'addr', 'add', `${this.node.ipv4}/24`, 'dev', 'br0');
		must('ip', '-n', node, 'addr', 'add', `${this.node.ipv6}/64`, 'dev', 'br0', 'nodad');
		must('ip', '-n', node, 'link', 'set', 'br0', 'up');
	}

	#netns(name: string): void {
		must('ip', 'netns', 'add', name);
		this.#undo.push(() => {
			must('ip', 'netns', 'del', name);
		});
		must('ip', '-n', name, 'link', 'set', 'lo', 'up');
	}

	async #clean(): Promise<void> {
		const problems: unknown[] = [];
		for (const undo of this.#undo.splice(0).reverse()) {
			try {
				await undo();
			} catch (error) {
				problems.push(error);
			}
		}

		if (problems.length > 0) {
			throw new AggregateError(problems, `the world ${this.id} was not cleaned up`);
		}
	}
}

export class Agent {
	constructor(readonly running: Running) {}

	get port(): number {
		return Number(/metrics at port (\d+)/.exec(this.running.stderr)?.[1]);
	}

	async get(page: string): Promise<{status: number; body: string}> {
		// A connection of its own: one that is kept may be closed by the agent just when it is used.
		const [response] = await once(get(`http://127.0.0.1:${this.port}${page}`, {agent: false}), 'response') as [IncomingMessage];
		return {status: response.statusCode!, body: await text(response)};
	}

	async ready(): Promise<void> {
		await this.running.until('metrics are served', () => this.port > 0);
		await eventually(`readyz\n${this.running.stderr}`, async () => (await this.get('/readyz')).status === 200);
	}

	/** Until it has made this many rounds of its control loop from now on. */
	async rounds(count: number): Promise<void> {
		const made = async () => {
			const {body} = await this.get('/metrics');
			return [...body.matchAll(/^sidestep_reconciles_total\{[^}]*} (\d+)/gm)].reduce((sum, [, value]) => sum + Number(value), 0);
		};

		const before = await made();
		await eventually(`${count} rounds`, async () => await made() >= before + count);
	}

	/** Until a line of the log, beyond `from` characters, matches. */
	async says(pattern: RegExp, from = 0): Promise<void> {
		await this.running.until(`log line ${String(pattern)}`, () => pattern.test(this.running.stderr.slice(from)));
	}
}

export class Pod {
	constructor(readonly world: World, readonly name: string, readonly netnsName: string, readonly ipv4: string, readonly ipv6: string) {}

	get netns(): string {
		return `/run/netns/${this.netnsName}`;
	}

	/** Command line that runs something in the pod, and in the world's cgroup. */
	command(command: readonly string[], as: As = {}): readonly [string, readonly string[]] {
		return [this.world.program('in'), [
			'--cgroup', as.cgroup ?? this.world.cgroup,
			'--netns', this.netns,
			...(as.uid === undefined ? [] : ['--uid', String(as.uid)]),
			...(as.gid === undefined ? [] : ['--gid', String(as.gid)]),
			'--', ...command,
		]];
	}

	run(command: readonly string[], as?: As): Result {
		return run(...this.command(command, as));
	}

	must(...command: readonly string[]): string {
		const [file, args] = this.command(command);
		return must(file, ...args);
	}

	start(command: readonly string[], as?: As): Running {
		const running = Running.start(...this.command(command, as));
		this.world.onEnd(async () => {
			await running.stop('SIGKILL');
		});
		return running;
	}

	async server(...addresses: readonly string[]): Promise<Running> {
		return this.#ready([this.world.program('server'), ...addresses]);
	}

	async proxy(options: readonly string[], as?: As): Promise<Running> {
		return this.#ready([this.world.program('proxy'), ...options], as);
	}

	async dnsserver(...addresses: readonly string[]): Promise<Running> {
		return this.#ready([this.world.program('dnsserver'), ...addresses]);
	}

	async ztunnel(options: readonly string[] = [], as?: As): Promise<Running> {
		return this.#ready([this.world.program('ztunnel'), ...options], as);
	}

	client(to: string, options: readonly string[] = [], as?: As): ClientResult {
		return this.connections([to], options, as)[0]!;
	}

	/** Connects to each in turn; all stay open until the last is done. */
	connections(to: readonly string[], options: readonly string[] = [], as?: As): ClientResult[] {
		return this.#asked<ClientResult>('client', to, options, as);
	}

	/** Asks each resolver, over one socket where it is UDP. */
	dns(to: readonly string[], options: readonly string[] = [], as?: As): DnsResult[] {
		return this.#asked<DnsResult>('dns', to, options, as);
	}

	startClients(to: readonly string[], options: readonly string[], as?: As): Running {
		return this.start([this.world.program('client'), ...to.flatMap(address => ['--to', address]), ...options], as);
	}

	async clients(to: readonly string[], options: readonly string[], as?: As): Promise<ManyResult> {
		const running = this.startClients(to, options, as);
		await running.ended;
		const last = running.lines<ManyResult>().at(-1);
		if (!last) {
			throw new Error(`no result: ${running.stderr}`);
		}

		return last;
	}

	#asked<T>(program: 'client' | 'dns', to: readonly string[], options: readonly string[], as?: As): T[] {
		const {stdout, stderr} = this.run([this.world.program(program), ...to.flatMap(address => ['--to', address]), ...options], as);
		if (!stdout) {
			throw new Error(`${program} ${to.join(' ')} ${options.join(' ')}: ${stderr}`);
		}

		return stdout.trimEnd().split('\n').map(line => JSON.parse(line) as T);
	}

	async #ready(command: readonly string[], as?: As): Promise<Running> {
		const running = this.start(command, as);
		await running.until('ready', () => running.stdout.includes('"ready":true'));
		return running;
	}
}

/** Processes that were killed leave their cgroup a moment later. */
async function removeCgroup(directory: string): Promise<void> {
	for (const pid of readFileSync(path.join(directory, 'cgroup.procs'), 'utf8').split('\n').filter(Boolean)) {
		try {
			process.kill(Number(pid), 'SIGKILL');
		} catch {}
	}

	await eventually(`${directory} is empty`, () => readFileSync(path.join(directory, 'cgroup.procs'), 'utf8').trim() === '');
	rmdirSync(directory);
}

/** Takes away what test runs left behind that were killed: names carry the pid. */
function sweep(): void {
	const isStale = (name: string) => {
		const pid = new RegExp(`^${PREFIX}-(\\d+)-`).exec(name)?.[1];
		return pid !== undefined && !existsSync(`/proc/${pid}`);
	};

	for (const name of existsSync('/run/netns') ? readdirSync('/run/netns').filter(isStale) : []) {
		run('ip', ['netns', 'del', name]);
	}

	for (const name of readdirSync(tmpdir()).filter(isStale)) {
		run('umount', ['-l', path.join(tmpdir(), name, 'bpf')]);
		rmSync(path.join(tmpdir(), name), {recursive: true, force: true});
	}

	const cgroups = findCgroup2();
	for (const name of cgroups ? readdirSync(cgroups).filter(isStale) : []) {
		for (const inner of [...readdirSync(path.join(cgroups!, name)), '']) {
			run('rmdir', [path.join(cgroups!, name, inner)]);
		}
	}
}
