/**
The only place that wires the parts together: `sidestep run`.
*/
import {FilePods} from './config/file-pods.js';
import type {PodSpec} from './config/pods-file.js';
import {HostError, reasonOf} from './errors.js';
import {load, type Datapath, type LoadOptions} from './loader/datapath.js';
import {ensureBpffs, requireCapabilities, requireProc, resolveCgroup} from './loader/host.js';
import {takeWriterLock} from './loader/lock.js';
import {openObject} from './loader/object.js';
import {PinLayout} from './loader/paths.js';
import {requireWorkingCapture} from './loader/probes.js';
import {Metrics} from './metrics/metrics.js';
import {serveMetrics, type Health} from './metrics/server.js';
import {native, type NetNs, type RingBuffer} from './native.js';
import {describeAcceleration, setAcceleration, wishNow, type AccelerationWish} from './loader/acceleration.js';
import type {NetnsCookie, PairRequest} from './maps/schema.js';
import {KubernetesNode, type KubernetesOptions} from './node/kubernetes.js';
import {openNodeNetns, reopenNetns, type NetnsFile} from './pods/facts.js';
import {joinPair} from './loader/pairs.js';
import {ControlLoop} from './pods/loop.js';
import {Reconciler, type Round} from './pods/reconcile.js';

export interface AgentOptions {
	/** Where the pods come from: a file, or Kubernetes. */
	readonly pods: {readonly file: string} | KubernetesOptions;
	readonly bpffs: string;
	/** cgroup v2 directory; the root by default. */
	readonly cgroup?: string | undefined;
	/** The host's /proc. */
	readonly proc: string;
	readonly metrics: {readonly host: string | undefined; readonly port: number};
	/** In what time every pod is looked at although nothing was heard; by the number of pods when left out. */
	readonly resyncMs?: number | undefined;
	readonly maxPods: number;
	/** The node's own namespace, whose processes' connections to pods pass as probes; process 1's by default. */
	readonly nodeNetns?: string | undefined;
	/** Connections that are older than a pod's enrolment are aborted, as iptables would. */
	readonly resetOlder: boolean;
	/** What it was before when left out; `off` at first. */
	readonly acceleration?: AccelerationWish | undefined;
	/** Another build's object, and its way to it. */
	readonly build?: Pick<LoadOptions, 'object' | 'migrations'>;
	readonly log: (line: string) => void;
	readonly signal: AbortSignal;
}

/** How often, and how long apart, a pair with unread bytes is looked at again. */
const UNREAD_RETRIES = 20;
const UNREAD_RETRY_MS = 3;

/**
Runs until `signal` aborts. Capture stays in place then, as it does when the process dies.

@throws AgentError before anything is changed: bad pods file, missing privilege, another agent, foreign pins, ….
*/
export async function runAgent(options: AgentOptions): Promise<void> {
	const {log} = options;
	const {pods} = options;
	// First, as a file that cannot be read is no reason to change anything.
	const file = 'file' in pods ? new FilePods(pods.file) : undefined;
	requireCapabilities();
	const cgroup = resolveCgroup(options.cgroup);
	requireProc(options.proc);
	const nodeNetns = nodeCookie(options);
	if (ensureBpffs(options.bpffs, options.proc) === 'mounted') {
		log(`mounted a bpf file system at ${options.bpffs}`);
	}

	const opened = openObject(options.build?.object);
	opened.object.close();
	const lock = takeWriterLock(new PinLayout(options.bpffs, opened.schema.layoutVersion));
	let datapath: Datapath | undefined;
	let loop: ControlLoop | undefined;
	let server: Awaited<ReturnType<typeof serveMetrics>>['server'] | undefined;
	let metrics: Metrics | undefined;
	let requests: RingBuffer | undefined;
	let node: KubernetesNode | undefined;
	let last: Round | undefined;
	let reconciler: Reconciler | undefined;
	const health = (): Health => {
		const problems = [
			...(loop?.isSettled ? [] : ['the first round is not done yet']),
			...(file ?? node)?.problems ?? [],
			...(file ? [...last?.failures.values() ?? []].map(error => error.message) : []),
		];
		return {alive: loop?.isTurning ?? true, ready: problems.length === 0, problems};
	};

	try {
		// First of all, as a port or a socket that is taken is no reason to leave programs behind.
		const served = await serveMetrics(options.metrics, async () => metrics?.registry.metrics() ?? '', health).catch((error: unknown) => {
			throw new HostError(`metrics cannot be served (${reasonOf(error)})`, 'choose another --metrics-address', {cause: error});
		});
		server = served.server;
		if (!('file' in pods)) {
			node = new KubernetesNode(pods, options.proc, name => reconciler?.formerOf(name), log);
			await node.listen();
		}

		requireWorkingCapture();
		const {maxPods} = options;
		const loaded = load(lock, {cgroup, maxEntries: {pods: maxPods, pod_info: maxPods, counters: maxPods, traffic: maxPods}, ...options.build});
		datapath = loaded.datapath;
		const wish = options.acceleration ?? wishNow(datapath);
		datapath.maps.node.set(0, {...datapath.maps.node.get(0)!, netns: nodeNetns});
		log(`acceleration is ${describeAcceleration(setAcceleration(datapath, wish))}`);
		requests = listenForPairs(datapath, () => last?.namespaces, () => options.signal.aborted, log);
		metrics = new Metrics(datapath);
		log(`programs ${loaded.how} at ${datapath.layout.current}, attached to ${cgroup}`);
		const capacity = datapath.rawMaps.get('pods')!.info().maxEntries;
		if (capacity !== maxPods) {
			log(`the adopted maps have room for ${capacity} pods, not ${maxPods}: \`sidestep unload\` first to change that`);
		}

		log(`metrics at port ${served.port}`);

		node?.registerMetrics(metrics.registry);
		const captured = new Reconciler(datapath, options);
		reconciler = captured;
		const specs = () => (file ?? node)!.specs;
		const report = new Report(log);
		const control = new ControlLoop(captured, {
			specs,
			resyncMs: options.resyncMs,
			onRound(round, durationMs, changedAt) {
				last = round;
				metrics!.recordRound(round, durationMs, changedAt === undefined ? undefined : performance.now() - changedAt);
				report.round(round, specs().values());
				node?.round(round);
			},
			onError(error) {
				metrics!.recordError('round');
				report.error(`this round failed (${reasonOf(error)}): trying again`);
			},
			onSettled() {
				node?.settled();
			},
		});
		loop = control;
		const wake = (names: Iterable<string>) => {
			control.wake(names);
		};

		file?.start(wake, problem => {
			metrics!.recordError('pods_file');
			log(problem);
		});
		await node?.start({wake, look: name => control.isSettled ? control.look(name) : undefined, namespaceOf: name => captured.namespaceOf(name), modeInKernel: name => captured.modeInKernel(name)}, options.signal);
		await control.run(options.signal);
		log('stopped; capture stays in place (`sidestep unload` takes it away)');
	} finally {
		file?.close();
		await node?.close();
		requests?.close();
		server?.close();
		server?.closeAllConnections();
		datapath?.close();
		lock.release();
	}
}

/** Joins each pair that the programs ask for. Ends with the handle; what is joined stays so. */
function listenForPairs(datapath: Datapath, namespaces: () => ReadonlyMap<NetnsCookie, NetnsFile> | undefined, isEnding: () => boolean, log: (line: string) => void): RingBuffer {
	const codec = datapath.schema.codec<PairRequest>('request');
	return native.openRingBuffer(datapath.rawMaps.get('requests')!, sample => {
		const request = codec.decode(sample);
		const open = (cookie: NetnsCookie) => {
			const file = namespaces()?.get(cookie);
			return file && reopenNetns(file);
		};

		const attempt = (left: number) => {
			try {
				// In the middle of an exchange something is unread; a moment later it is not.
				if (!isEnding() && joinPair(datapath, request, open) === 'REASON_UNACCELERATED_UNREAD' && left > 0) {
					setTimeout(attempt, UNREAD_RETRY_MS, left - 1).unref();
				}
			} catch (error) {
				log(`a pair of sockets stays on TCP (${reasonOf(error)})`);
			}
		};

		attempt(UNREAD_RETRIES);
	}, {maxPerWakeup: 64});
}

function nodeCookie({nodeNetns, proc}: AgentOptions): bigint {
	let netns: NetNs;
	try {
		netns = nodeNetns === undefined ? openNodeNetns(proc) : native.openNetns(nodeNetns);
	} catch (error) {
		throw new HostError(`the node's own network namespace cannot be opened (${reasonOf(error)})`, 'give it by --node-netns, or the host\'s /proc by --proc', {cause: error});
	}

	try {
		return netns.cookie();
	} finally {
		netns.close();
	}
}

/** Says each thing once, until it changes, and not at every round. */
class Report {
	#notes: ReadonlySet<string> = new Set();
	#failures: ReadonlyMap<string, string> = new Map();
	#error: string | undefined;

	/** Of hundreds of pods, one or two are others than in the round before. */
	readonly #lines = new WeakMap<PodSpec, readonly string[]>();

	constructor(readonly log: (line: string) => void) {}

	round({changes, failures, notes}: Round, specs: Iterable<PodSpec>): void {
		const lines = new Set(notes);
		for (const spec of specs) {
			for (const line of this.#linesOf(spec)) {
				lines.add(line);
			}
		}

		const messages = new Map([...failures].map(([pod, {message}]) => [pod, message]));
		for (const line of [
			...[...lines].filter(line => !this.#notes.has(line)),
			...changes,
			...[...messages].filter(([pod, message]) => this.#failures.get(pod) !== message).map(([, message]) => message),
		]) {
			this.log(line);
		}

		this.#notes = lines;
		this.#failures = messages;
		this.#error = undefined;
	}

	#linesOf(spec: PodSpec): readonly string[] {
		const {name, wish} = spec;
		const lines = this.#lines.get(spec) ?? ('leave' in wish ? [`pod ${name} is not captured: ${wish.leave}`] : 'warnings' in wish ? wish.warnings.map(warning => `pod ${name}: ${warning}`) : []);
		this.#lines.set(spec, lines);
		return lines;
	}

	error(line: string): void {
		if (this.#error !== line) {
			this.log(line);
		}

		this.#error = line;
	}
}
