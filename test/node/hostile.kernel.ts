/** Forty pods whose labels change while the API server does everything wrong that one can, and the agent is killed in between: after it the kernel has what the labels say. */
import {readFileSync, readdirSync} from 'node:fs';
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {AMBIENT, Cluster, type ClusterPod} from '../helpers/cluster.js';
import {eventually} from '../helpers/process.js';
import {startNodeVersion} from '../helpers/versions.js';
import type {Agent} from '../helpers/world.js';
import type {FakeApiServer, Hostility} from '../kubernetes/fake-server.js';

const PODS = 40;
const THIS_LAYOUT = 2;
const TIMING = {client: {requestMs: 1500, credentialsMs: 3000, gapMs: 200, maxBackoffMs: 300}, reflector: {inactivityMs: 1500, steadyMs: 200, pageSize: 7}};
const STEP_MS = 400;
const FLIP_MS = 20;
const WRONGS: ReadonlyArray<Partial<Hostility> | 'away'> = [
	{closeWatches: true}, {gone: 'http'}, {gone: 'in band'}, {gone: 'http', gonePages: true}, {inBandStatus: 500}, {event: 'reset'}, {event: 'half'}, {event: 'closed'}, {event: 'garbage'},
	{event: 'endless'}, {repeats: true, shuffled: true}, {trickleBytes: 1}, {silent: true}, {reset: true}, {status: 500}, {status: 429, retryAfter: '0.1'}, {status: 403},
	{list: 'garbage', gone: 'http'}, {list: 'no version', gone: 'http'}, {list: 'pages without end', gone: 'http'}, {reset: true, chance: 0.5}, 'away',
];

const isAmbient = (cluster: Cluster, {key}: ClusterPod) => cluster.object(key)!.metadata.labels?.['istio.io/dataplane-mode'] === 'ambient';

/** As somebody with kubectl: what else the object has stays. */
function flip(cluster: Cluster, pod: ClusterPod): void {
	const object = cluster.object(pod.key)!;
	cluster.api.put('pods', {...object, metadata: {...object.metadata, labels: isAmbient(cluster, pod) ? {} : AMBIENT}});
}

/** All that goes wrong, in turn. @returns how many labels changed. */
async function misbehave(cluster: Cluster, pods: readonly ClusterPod[], onStep: (step: number) => void = () => {}): Promise<number> {
	const {api} = cluster;
	let flips = 0;
	const timer = setInterval(() => {
		flip(cluster, pods[Math.floor(Math.random() * pods.length)]!);
		flips++;
	}, FLIP_MS);
	for (const [step, wrong] of WRONGS.entries()) {
		onStep(step);
		if (wrong === 'away') {
			await api.stop();
			await sleep(STEP_MS);
			api.compact();
			await api.listen();
		} else {
			api.behave(wrong);
			api.endWatches();
			await sleep(STEP_MS);
		}
	}

	clearInterval(timer);
	api.behave();
	return flips;
}

async function untilRight(t: ExecutionContext, cluster: Cluster, pods: readonly ClusterPod[]): Promise<void> {
	const ambient = pods.filter(pod => isAmbient(cluster, pod));
	t.true(ambient.length > 0 && ambient.length < PODS, 'worth to look at');
	await eventually('the annotations say what the labels want', () => pods.every(pod => cluster.redirection(pod.key) === (isAmbient(cluster, pod) ? 'enabled' : undefined)));
	t.deepEqual(cluster.enrolled(), ambient.map(({key}) => key).sort());
}

/** Reads and writes since then. Each that fails has to wait for a gap; what is answered is bounded by what changed. */
function requests({history}: FakeApiServer, fromMs: number): {readonly reads: number; readonly writes: number} {
	const made = history.filter(({atMs}) => atMs >= fromMs);
	const reads = made.filter(({method}) => method === 'GET').length;
	return {reads, writes: made.length - reads};
}

function resources({running}: Agent): {readonly rssKb: number; readonly fds: number} {
	const directory = `/proc/${running.child.pid}`;
	return {rssKb: Number(/^VmRSS:\s+(\d+)/m.exec(readFileSync(`${directory}/status`, 'utf8'))![1]), fds: readdirSync(`${directory}/fd`).length};
}

test('after all that an API server can do wrong, the kernel\'s pods and the annotations are what the labels say', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop');
	const pods: ClusterPod[] = [];
	for (let index = 0; index < PODS; index++) {
		pods.push(await cluster.pod(`shop/web-${index}`, index % 2 ? {labels: AMBIENT} : {}));
	}

	cluster.ztunnel(['--brief']);
	const start = async () => startNodeVersion(cluster, THIS_LAYOUT, {timing: TIMING});
	const first = await start();
	await untilRight(t, cluster, pods);
	let next: Promise<Agent> | undefined;
	await misbehave(cluster, pods, step => {
		if (step === Math.floor(WRONGS.length / 2)) {
			next = first.running.stop('SIGKILL').then(start);
			// It is ready when the server behaves.
			next.catch(() => undefined);
		}
	});
	const second = await next!;
	await untilRight(t, cluster, pods);

	const before = resources(second);
	const fromMs = performance.now();
	const flips = await misbehave(cluster, pods);
	await untilRight(t, cluster, pods);
	const tookMs = performance.now() - fromMs;
	const after = resources(second);
	const {reads, writes} = requests(cluster.api, fromMs);
	t.log({before, after, flips, reads, writes, tookMs});
	t.true(reads <= tookMs / TIMING.client.gapMs + 2 * WRONGS.length, `${reads} reads in ${tookMs} ms`);
	t.true(writes <= flips + PODS, `${writes} writes for ${flips} changes`);
	t.true(after.fds <= before.fds + 4, `${before.fds} fds before, ${after.fds} after`);
	// What lines and lists without end took is given back some time later.
	await eventually(`${before.rssKb} KB before, ${after.rssKb} after`, () => resources(second).rssKb <= before.rssKb + 30_000);
	t.notRegex(second.running.stderr, /round failed|TypeError/);
});
