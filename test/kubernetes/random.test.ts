/**
Everything at once: random changes under random hostility, token and certificate replaced, the server away. In the calm after it the cache is the server's state.
*/
import {writeFileSync} from 'node:fs';
import path from 'node:path';
import {performance} from 'node:perf_hooks';
import {setTimeout as sleep} from 'node:timers/promises';
import test from 'ava';
import {StatusWriter, REDIRECTION} from '../../src/kubernetes/status.js';
import {eventually} from '../helpers/process.js';
import {makeNamespace, makePod, type Hostility} from './fake-server.js';
import {followNamespaces, followPods, makeBench, untilEqual} from './helpers.js';

const ROUNDS = 300;
const CALM_EVERY = 60;
const SEED = Number(process.env['SEED'] ?? Math.floor(Math.random() * 2 ** 31));

/** mulberry32. */
function generator(seed: number): () => number {
	let state = seed;
	return () => {
		state = (state + 0x6d_2b_79_f5) | 0;
		let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
		mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
		return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
	};
}

test(`random hostility and changes, seed ${SEED}`, async t => {
	const random = generator(SEED);
	const below = (bound: number) => Math.floor(random() * bound);
	const oneOf = <T>(choices: readonly T[]) => choices[below(choices.length)]!;
	const bench = await makeBench(t, {timing: {requestMs: 150, credentialsMs: 200, gapMs: 10, maxBackoffMs: 100}});
	const {server, client, directory, signal, log} = bench;
	server.random = random;
	const pods = followPods(bench, {inactivityMs: 150, steadyMs: 30, watchSeconds: 15, pageSize: 5});
	const namespaces = followNamespaces(bench, {inactivityMs: 150, steadyMs: 30, watchSeconds: 15, pageSize: 5});
	const writer = new StatusWriter({client, log() {}, signal, settleMs: 50});

	const hostilities: ReadonlyArray<() => Partial<Hostility>> = [
		() => ({}), () => ({}), () => ({closeWatches: true}), () => ({gone: 'http'}), () => ({gone: 'in band'}), () => ({gonePages: true}), () => ({inBandStatus: oneOf([400, 500, 504])}),
		() => ({event: oneOf(['reset', 'half', 'garbage', 'endless', 'closed'] as const)}), () => ({repeats: true}), () => ({shuffled: true}), () => ({shuffled: true, repeats: true}),
		() => ({trickleBytes: 1 + below(50)}), () => ({silent: true}), () => ({reset: true}), () => ({status: oneOf([400, 403, 404, 408, 500, 503])}),
		() => ({status: 429, retryAfter: '0.05'}), () => ({list: oneOf(['garbage', 'no version', 'pages without end'] as const), gone: 'http'}), () => ({onPage: changeSomething}),
	];

	function changeSomething(): void {
		const name = `shop-${below(3)}/web-${below(25)}`;
		switch (below(6)) {
			case 0: { server.delete('pods', name); break; }
			case 1: { server.put('pods', makePod(name, {uid: `uid-${below(1e9)}`})); break; }
			case 2: { server.put('pods', makePod(name, {nodeName: oneOf(['node-1', 'node-2'])})); break; }
			case 3: { server.put('namespaces', makeNamespace(`ns-${below(8)}`, {version: String(below(100))})); break; }
			case 4: { server.delete('namespaces', `ns-${below(8)}`); break; }
			default: { server.put('pods', makePod(name, {ips: [`10.0.${below(250)}.1`], labels: {a: String(below(10))}, phase: oneOf(['Pending', 'Running', 'Succeeded'])})); }
		}
	}

	const wish = () => {
		for (const pod of pods.reflector.items.values()) {
			writer.set(pod, pod.phase === 'Running' ? 'enabled' : undefined);
		}
	};

	const started = performance.now();
	for (let round = 1; round <= ROUNDS; round++) {
		server.behave({chance: oneOf([0.2, 0.7, 1]), ...oneOf(hostilities)()});
		for (let count = below(6); count > 0; count--) {
			changeSomething();
		}

		wish();
		switch (below(20)) {
			case 0: { server.compact(); break; }
			case 1: { server.endWatches(); break; }
			case 2: { server.resetConnections(); break; }
			case 3: {
				const token = `token-${round}`;
				server.tokens.clear();
				server.tokens.add(token);
				await sleep(below(30));
				writeFileSync(path.join(directory, 'token'), token);
				break;
			}

			case 4: {
				server.rotateCertificate();
				await sleep(below(30));
				writeFileSync(path.join(directory, 'ca.crt'), server.ca!);
				break;
			}

			case 5: {
				await server.stop();
				changeSomething();
				await sleep(below(60));
				if (random() < 0.5) {
					server.compact();
				}

				await server.listen();
				break;
			}

			default:
		}

		await sleep(below(60));
		if (round % CALM_EVERY === 0) {
			server.behave();
			await untilEqual(t, server, pods);
			await untilEqual(t, server, namespaces, 'namespaces');
			await eventually('annotations are as wished', () => {
				wish();
				return writer.pending === 0 && [...pods.reflector.items.values()].every(pod => pod.annotations[REDIRECTION] === (pod.phase === 'Running' ? 'enabled' : undefined));
			});
			await untilEqual(t, server, pods);
		}
	}

	const rate = server.history.length / (performance.now() - started) * 10;
	t.log(`${ROUNDS} rounds, ${server.history.length} requests (${rate.toFixed(2)} a gap), ${JSON.stringify(pods.reflector.counters)}`);
	t.true(log.length < ROUNDS * 5);
	t.is(new Set(pods.told.flat()).size > 0, true);
	await eventually('all is well', () => client.pace.isHealthy && client.pace.waiting === 0);
});
