/**
What the agent costs on a node of a cluster: 250 pods from cold, a pod's event to its enforcement, memory, and CPU at rest. `node dist/bench/node.js`.
*/
import {readFileSync} from 'node:fs';
import {setTimeout as sleep} from 'node:timers/promises';
import {openDatapath} from '../src/loader/datapath.js';
import {native} from '../src/native.js';
import {AMBIENT, Cluster, type ClusterPod} from '../test/helpers/cluster.js';
import {eventually} from '../test/helpers/process.js';
import {parseOptions} from './frame.js';
import {quantile} from './series.js';

const TICKS_PER_SECOND = 100;
/** Events before those that are measured: an agent that has run for a second is not what a node has. */
const WARM_UP = 100;

const {output, counts} = parseOptions('node [-o table|json] [--pods N] [--events N] [--idle SECONDS]', {pods: 250, events: 500, idle: 60});
const undo: Array<() => void | Promise<void>> = [];
try {
	const cluster = await Cluster.create({teardown: clean => undo.push(clean)});
	cluster.namespace('shop');
	const pods: ClusterPod[] = [];
	for (let index = 0; index < counts.pods; index++) {
		pods.push(await cluster.pod(`shop/p${index}`, {labels: AMBIENT}));
	}

	const started = performance.now();
	const agent = cluster.startAgent();
	await agent.running.until('programs are attached', () => agent.running.stderr.includes('metrics at port'));
	const loadedMs = performance.now() - started;
	const datapath = openDatapath(cluster.world.bpffs);
	await eventually('all are enrolled', () => datapath.rawMaps.get('pods')!.count() === pods.length, 120_000);
	const coldMs = performance.now() - started;
	await agent.ready();
	await eventually('all are reported', () => pods.every(({key}) => cluster.redirection(key) !== undefined), 120_000);

	const cookies = pods.map(({pod}) => {
		const netns = native.openNetns(pod.netns);
		const cookie = netns.cookie();
		netns.close();
		return cookie;
	});
	const lags: number[] = [];
	for (let index = 0; index < WARM_UP + counts.events; index++) {
		const which = index % pods.length;
		const isWanted = datapath.maps.pods.get(cookies[which]!) === undefined;
		const from = performance.now();
		cluster.put(pods[which]!, isWanted ? {labels: AMBIENT} : {});
		while ((datapath.maps.pods.get(cookies[which]!) !== undefined) !== isWanted) {
			// Not busily: this is the API server too, and the agent has no more than the other CPU.
			await sleep(1);
		}

		if (index >= WARM_UP) {
			lags.push(performance.now() - from);
		}

		await sleep(5);
	}

	for (const pod of pods) {
		cluster.put(pod, {labels: AMBIENT});
	}

	await eventually('all are enrolled again', () => datapath.rawMaps.get('pods')!.count() === pods.length, 120_000);
	datapath.close();
	await sleep(2000);
	const pid = agent.running.child.pid!;
	const ticks = () => readFileSync(`/proc/${pid}/stat`, 'utf8').replace(/^.*\) /, '').split(' ').slice(11, 13).reduce((sum, text) => sum + Number(text), 0);
	const before = ticks();
	const idleFrom = performance.now();
	await sleep(counts.idle * 1000);
	const idlePercent = (ticks() - before) / TICKS_PER_SECOND / ((performance.now() - idleFrom) / 1000) * 100;
	const residentMb = Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))![1]) / 1024;
	lags.sort((a, b) => a - b);
	const result = {
		pods: pods.length, loadedMs: Math.round(loadedMs), enforcedAfterLoadMs: Math.round(coldMs - loadedMs), coldMs: Math.round(coldMs),
		eventMs: {p50: quantile(lags, 0.5), p99: quantile(lags, 0.99), max: lags.at(-1)}, residentMb: Math.round(residentMb), idlePercent: Number(idlePercent.toFixed(2)),
	};
	process.stdout.write(output === 'json' ? `${JSON.stringify(result)}\n` : `${[
		`${result.pods} pods from cold: programs attached after ${result.loadedMs} ms, all pods enforced ${result.enforcedAfterLoadMs} ms later`,
		`a pod's event to its enforcement: p50 ${result.eventMs.p50.toFixed(1)} ms, p99 ${result.eventMs.p99.toFixed(1)} ms, max ${result.eventMs.max!.toFixed(1)} ms (${lags.length} events)`,
		`resident ${result.residentMb} MiB; CPU at rest ${result.idlePercent} % over ${counts.idle} s`,
	].join('\n')}\n`);
} finally {
	for (const clean of undo.reverse()) {
		await clean();
	}
}
