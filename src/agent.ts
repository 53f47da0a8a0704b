/**
The only place that wires the parts together: `sidestep run`.
*/
import {readFileSync, statSync, watch, type FSWatcher} from 'node:fs';
import path from 'node:path';
import {parsePodsFile, type PodSpec} from './config/pods-file.js';
import {HostError, InputError, reasonOf} from './errors.js';
import {load, type Datapath} from './loader/datapath.js';
import {ensureBpffs, requireCapabilities, resolveCgroup} from './loader/host.js';
import {takeWriterLock} from './loader/lock.js';
import {openObject} from './loader/object.js';
import {PinLayout} from './loader/paths.js';
import {requireWorkingCapture} from './loader/probes.js';
import {Metrics} from './metrics/metrics.js';
import {serveMetrics, type Health} from './metrics/server.js';
import {native, type NetNs, type RingBuffer} from './native.js';
import {describeAcceleration, setAcceleration, wishNow, type AccelerationWish} from './loader/acceleration.js';
import type {NetnsCookie, PairRequest} from './maps/schema.js';
import {openNodeNetns, reopenNetns, type NetnsFile} from './pods/facts.js';
import {joinPair} from './loader/pairs.js';
import {reconcile, type Round} from './pods/reconcile.js';

export interface AgentOptions {
	readonly podsFile: string;
	readonly bpffs: string;
	/** cgroup v2 directory; the root by default. */
	readonly cgroup?: string | undefined;
	/** The host's /proc. */
	readonly proc: string;
	readonly metrics: {readonly host: string | undefined; readonly port: number};
	/** How often the kernel is compared with the pods file although nothing was heard. */
	readonly resyncMs: number;
	readonly maxPods: number;
	/** The node's own namespace, whose processes' connections to pods pass as probes; process 1's by default. */
	readonly nodeNetns?: string | undefined;
	/** See {@link reconcile}. */
	readonly resetOlder: boolean;
	/** What it was before when left out; `off` at first. */
	readonly acceleration?: AccelerationWish | undefined;
	readonly log: (line: string) => void;
	readonly signal: AbortSignal;
}

/** A file that is replaced makes several events. */
const SETTLE_MS = 20;
/** How often, and how long apart, a pair with unread bytes is looked at again. */
const UNREAD_RETRIES = 20;
const UNREAD_RETRY_MS = 3;

/**
Runs until `signal` aborts. Capture stays in place then, as it does when the process dies.

@throws AgentError before anything is changed: bad pods file, missing privilege, another agent, foreign pins, ….
*/
export async function runAgent(options: AgentOptions): Promise<void> {
	const {log} = options;
	let specs = readPodsFile(options.podsFile);
	requireCapabilities();
	const cgroup = resolveCgroup(options.cgroup);
	if (ensureBpffs(options.bpffs) === 'mounted') {
		log(`mounted a bpf file system at ${options.bpffs}`);
	}

	const opened = openObject();
	opened.object.close();
	const lock = takeWriterLock(new PinLayout(options.bpffs, opened.schema.layoutVersion));
	let datapath: Datapath | undefined;
	const loop = new Loop(options.resyncMs);
	let server: Awaited<ReturnType<typeof serveMetrics>>['server'] | undefined;
	let watcher: FSWatcher | undefined;
	let metrics: Metrics | undefined;
	let requests: RingBuffer | undefined;
	let last: Round | undefined;
	let fileProblem: string | undefined;
	const health = (): Health => {
		const problems = [
			...(last ? [] : ['the first round is not done yet']),
			...(fileProblem === undefined ? [] : [`${fileProblem} (the last good pods file stays in force)`]),
			...[...last?.failures.values() ?? []].map(error => error.message),
		];
		return {alive: loop.isTurning, ready: problems.length === 0, problems};
	};

	try {
		// First of all, as a port that is taken is no reason to leave programs behind.
		const served = await serveMetrics(options.metrics, async () => metrics?.registry.metrics() ?? '', health).catch((error: unknown) => {
			throw new HostError(`metrics cannot be served (${reasonOf(error)})`, 'choose another --metrics-address', {cause: error});
		});
		server = served.server;
		requireWorkingCapture();
		const {maxPods} = options;
		const loaded = load(lock, {cgroup, maxEntries: {pods: maxPods, pod_info: maxPods, counters: maxPods}});
		datapath = loaded.datapath;
		const wish = options.acceleration ?? wishNow(datapath);
		datapath.maps.node.set(0, {...datapath.maps.node.get(0)!, netns: nodeCookie(options)});
		log(`acceleration is ${describeAcceleration(setAcceleration(datapath, wish))}`);
		requests = listenForPairs(datapath, () => last?.namespaces);
		metrics = new Metrics(datapath);
		log(`programs ${loaded.how} at ${datapath.layout.current}, attached to ${cgroup}`);
		const capacity = datapath.rawMaps.get('pods')!.info().maxEntries;
		if (capacity !== maxPods) {
			log(`the adopted maps have room for ${capacity} pods, not ${maxPods}: \`sidestep unload\` first to change that`);
		}

		log(`metrics at port ${served.port}`);

		watcher = watchFile(options.podsFile, () => loop.wake());
		const reported = new Map<string, string>();
		const notes = new Set<string>();
		await loop.run(options.signal, changedAt => {
			try {
				specs = readPodsFile(options.podsFile);
				fileProblem = undefined;
			} catch (error) {
				metrics!.recordError('pods_file');
				if (fileProblem !== reasonOf(error)) {
					log(`${reasonOf(error)} (the last good pods file stays in force)`);
				}

				fileProblem = reasonOf(error);
			}

			const started = performance.now();
			try {
				last = reconcile(datapath!, specs, options);
			} catch (error) {
				metrics!.recordError('round');
				log(`this round failed (${reasonOf(error)}): trying again in ${options.resyncMs} ms`);
				return;
			}

			metrics!.recordRound(last, performance.now() - started, changedAt === undefined ? undefined : performance.now() - changedAt);
			reportNotes(specs, last.notes, notes, log);
			for (const change of last.changes) {
				log(change);
			}

			reportFailures(last, reported, log);
		});
		log('stopped; capture stays in place (`sidestep unload` takes it away)');
	} finally {
		watcher?.close();
		requests?.close();
		server?.close();
		server?.closeAllConnections();
		datapath?.close();
		lock.release();
	}
}

/** Joins each pair that the programs ask for. Ends with the handle; what is joined stays so. */
function listenForPairs(datapath: Datapath, namespaces: () => ReadonlyMap<NetnsCookie, NetnsFile> | undefined): RingBuffer {
	const codec = datapath.schema.codec<PairRequest>('request');
	return native.openRingBuffer(datapath.rawMaps.get('requests')!, sample => {
		const request = codec.decode(sample);
		const open = (cookie: NetnsCookie) => {
			const file = namespaces()?.get(cookie);
			return file && reopenNetns(file);
		};

		const attempt = (left: number) => {
			// In the middle of an exchange something is unread; a moment later it is not.
			if (joinPair(datapath, request, open) === 'REASON_UNACCELERATED_UNREAD' && left > 0) {
				setTimeout(attempt, UNREAD_RETRY_MS, left - 1).unref();
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

/** What is said about pods that are left alone, or whose labels, annotations or addresses are odd: once, until it changes. */
function reportNotes(specs: readonly PodSpec[], notes: readonly string[], reported: Set<string>, log: (line: string) => void): void {
	const lines = new Set([...notes, ...specs.flatMap(({name, wish}) => 'leave' in wish ? [`pod ${name} is not captured: ${wish.leave}`] : 'warnings' in wish ? wish.warnings.map(warning => `pod ${name}: ${warning}`) : [])]);
	for (const line of lines) {
		if (!reported.has(line)) {
			log(line);
		}
	}

	reported.clear();
	for (const line of lines) {
		reported.add(line);
	}
}

/** Each failure once, not at every resync. */
function reportFailures(round: Round, reported: Map<string, string>, log: (line: string) => void): void {
	for (const [pod, error] of round.failures) {
		if (reported.get(pod) !== error.message) {
			log(error.message);
		}
	}

	reported.clear();
	for (const [pod, error] of round.failures) {
		reported.set(pod, error.message);
	}
}

function readPodsFile(file: string): readonly PodSpec[] {
	let text: string;
	try {
		// Reading a fifo would wait for its writer.
		if (!statSync(file).isFile()) {
			throw new TypeError('it is not a regular file');
		}

		text = readFileSync(file, 'utf8');
	} catch (error) {
		throw new InputError(file, `cannot be read (${reasonOf(error)})`, {cause: error});
	}

	return parsePodsFile(text, file);
}

/**
Watches the directory, as a file that is replaced by rename (editors, Kubernetes' volumes with their symbolic links) is a new file each time. Any
event counts: reading the file again is cheap.
*/
function watchFile(file: string, onChange: () => void): FSWatcher {
	const watcher = watch(path.dirname(path.resolve(file)), onChange);
	// The directory itself may be removed; the resync goes on reading.
	watcher.on('error', onChange);
	return watcher;
}

/** Turns when woken, and at each resync. */
class Loop {
	isTurning = true;
	#wake: (() => void) | undefined;
	#changedAt: number | undefined;

	constructor(readonly resyncMs: number) {}

	wake(): void {
		this.#changedAt ??= performance.now();
		this.#wake?.();
	}

	/** @param turn - given when the change that woke it was heard (performance.now()), undefined for a resync. */
	async run(signal: AbortSignal, turn: (changedAt: number | undefined) => void): Promise<void> {
		try {
			while (!signal.aborted) {
				const changedAt = this.#changedAt;
				this.#changedAt = undefined;
				turn(changedAt);
				await this.#sleep(signal);
			}
		} finally {
			this.isTurning = false;
		}
	}

	async #sleep(signal: AbortSignal): Promise<void> {
		await new Promise<void>(resolve => {
			let timer: NodeJS.Timeout;
			const done = () => {
				clearTimeout(timer);
				signal.removeEventListener('abort', done);
				this.#wake = undefined;
				resolve();
			};

			const soon = () => {
				clearTimeout(timer);
				this.#wake = undefined;
				timer = setTimeout(done, SETTLE_MS);
			};

			timer = setTimeout(done, this.resyncMs);
			signal.addEventListener('abort', done);
			this.#wake = soon;
			if (this.#changedAt !== undefined) {
				soon();
			}
		});
	}
}
