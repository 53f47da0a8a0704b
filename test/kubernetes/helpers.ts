/**
A client and reflectors against a {@link FakeApiServer}, with times short enough for tests.
*/
import {mkdtempSync, rmSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {performance} from 'node:perf_hooks';
import type {ExecutionContext} from 'ava';
import {KubernetesClient, type ClientTiming} from '../../src/kubernetes/client.js';
import {readNamespace, readPod, type NamespaceObject, type PodObject} from '../../src/kubernetes/objects.js';
import {Reflector, type ReflectorTiming} from '../../src/kubernetes/reflector.js';
import {eventually} from '../helpers/process.js';
import {FakeApiServer, type FakeApiServerOptions, type Kind} from './fake-server.js';

/** A hundredth of the real times, but for how long a busy machine may take to answer. */
export const FAST: ClientTiming = {requestMs: 20_000, credentialsMs: 600, gapMs: 10, maxBackoffMs: 300};
export const FAST_WATCH: ReflectorTiming = {inactivityMs: 5000, steadyMs: 50, watchSeconds: 300, pageSize: 100};
export const FAST_SERVER: FakeApiServerOptions = {bookmarkMs: 60, secondMs: 10, token: 'good'};

export interface Bench {
	readonly server: FakeApiServer;
	readonly client: KubernetesClient;
	readonly directory: string;
	readonly signal: AbortSignal;
	readonly log: string[];
	/** Ends what follows the server. Called at the end of the test in any case. */
	readonly stop: () => void;
}

export async function makeBench(t: ExecutionContext, {server: serverOptions = {}, timing = FAST, credentials = {}}: {
	readonly server?: FakeApiServerOptions; readonly timing?: Partial<ClientTiming>; readonly credentials?: object;
} = {}): Promise<Bench> {
	const server = await FakeApiServer.start({...FAST_SERVER, ...serverOptions});
	const directory = mkdtempSync(path.join(tmpdir(), 'sidestep-kubernetes-'));
	const controller = new AbortController();
	const log: string[] = [];
	const client = new KubernetesClient({
		...server.writeCredentials(directory), timing, ...credentials,
		log(line) {
			log.push(line);
		},
	});
	t.teardown(async () => {
		controller.abort();
		client.close();
		await server.stop();
		rmSync(directory, {recursive: true});
	});
	return {
		server, client, directory, log, signal: controller.signal,
		stop() {
			controller.abort();
		},
	};
}

/** Keys that were told as changed, in order. */
export interface Following<T extends PodObject | NamespaceObject> {
	readonly reflector: Reflector<T>;
	readonly told: string[][];
	readonly ended: Promise<void>;
}

export function followPods(bench: Bench, timing: Partial<ReflectorTiming> = {}, node = 'node-1'): Following<PodObject> {
	return follow(bench, '/api/v1/pods', readPod, timing, {fieldSelector: `spec.nodeName=${node}`});
}

export function followNamespaces(bench: Bench, timing: Partial<ReflectorTiming> = {}): Following<NamespaceObject> {
	return follow(bench, '/api/v1/namespaces', readNamespace, timing);
}

function follow<T extends PodObject | NamespaceObject>({client, signal, log}: Bench, target: string, transform: (object: unknown) => T | undefined, timing: Partial<ReflectorTiming>, query: Record<string, string> = {}): Following<T> {
	const told: string[][] = [];
	const reflector = new Reflector<T>({
		client, path: target, query, transform,
		onChange(keys) {
			told.push([...keys].sort());
		},
		log(line) {
			log.push(line);
		},
		timing: {...FAST_WATCH, ...timing},
	});
	return {reflector, told, ended: reflector.run(signal)};
}

/** What a cache of the server's objects should hold. */
export function truth(server: FakeApiServer, kind: Kind, node = 'node-1'): unknown {
	const objects = server.list(kind).filter(({spec}) => kind === 'namespaces' || (spec as {readonly nodeName: string}).nodeName === node);
	return new Map(objects.map(object => kind === 'pods' ? readPod(object)! : readNamespace(object)!).map(object => [('namespace' in object ? `${object.namespace}/` : '') + object.name, object] as const)
		.sort(([a], [b]) => a < b ? -1 : 1));
}

/**
Waits until the bench's only watch, the reflector's `watches`-th, has been open for `steadyMs` by the reflector's own clock, so that its end is a regular one. The server has to
send bookmarks.
*/
export async function untilSteady({server}: Bench, {reflector}: Following<PodObject | NamespaceObject>, watches: number): Promise<void> {
	await eventually(`watch ${watches}`, () => reflector.counters.watches === watches && server.openWatches === 1);
	const begun = performance.now();
	await eventually('it is open', () => reflector.lastContactMs! > begun);
	const openedBefore = reflector.lastContactMs!;
	await eventually('it is steady', () => reflector.lastContactMs! > openedBefore + FAST_WATCH.steadyMs);
}

/** Lets every draw come out in the middle, for the rest of this test, which has to be a serial one: each back-off takes half of its bound. */
export function withoutJitter(t: ExecutionContext): void {
	const {random} = Math;
	Math.random = () => 0.5;
	t.teardown(() => {
		Math.random = random;
	});
}

/** Checks that after the first `from` requests each one came later than the one before by `leastMs` of its number. This does not depend on how quick the machine is. */
export function checkGaps(t: ExecutionContext, server: FakeApiServer, from: number, leastMs: (index: number) => number): void {
	const times = server.history.map(({atMs}) => atMs);
	for (let index = from; index < times.length; index++) {
		const gapMs = times[index]! - times[index - 1]!;
		// Timers may be early by a part of a millisecond.
		t.true(gapMs >= leastMs(index) - 1, `request ${index} came after ${gapMs} ms, not ${leastMs(index)}`);
	}
}

export function sorted<T>(items: ReadonlyMap<string, T>): Map<string, T> {
	return new Map([...items].sort(([a], [b]) => a < b ? -1 : 1));
}

/** Waits until the cache is what the server has. */
export async function untilEqual(t: ExecutionContext, server: FakeApiServer, {reflector}: Following<PodObject | NamespaceObject>, kind: Kind = 'pods'): Promise<void> {
	const same = () => reflector.isSynced && JSON.stringify([...sorted(reflector.items)]) === JSON.stringify([...truth(server, kind) as Map<string, unknown>]);
	await eventually(`the cache of ${kind} equals the server's`, same).catch(error => {
		t.log('cache', sorted(reflector.items), 'server', truth(server, kind));
		throw error;
	});
	t.deepEqual(sorted(reflector.items), truth(server, kind) as Map<string, PodObject | NamespaceObject>);
}
