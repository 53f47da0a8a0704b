/** The whole agent, between a cluster and a stand-in for ztunnel. */
import {statSync, unlinkSync, writeFileSync} from 'node:fs';
import {setTimeout as sleep} from 'node:timers/promises';
import test from 'ava';
import {AMBIENT, Cluster, type ClusterPod} from '../helpers/cluster.js';
import {eventually, must, type Running} from '../helpers/process.js';
import type {ZdsLine} from './helpers.js';

const told = (ztunnel: Running) => ztunnel.lines<ZdsLine>().filter(({zds}) => zds !== undefined).map(({zds, uid, workloads}) => [zds, uid ?? workloads].join(' ').trim());

test.serial('a ztunnel that connects before the agent knows its pods hears nothing, and keeps all; then comes a snapshot with every pod, also one that stays captured and cannot be looked at', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const far = cluster.world.pod('far');
	await far.server(`${far.ipv4}:8080`);
	const [good, bad, gone] = [await cluster.pod('shop/good'), await cluster.pod('shop/bad'), await cluster.pod('shop/gone')];
	const works = (...pods: readonly ClusterPod[]) => pods.map(({pod}) => pod.client(`${far.ipv4}:8080`).outcome);
	const first = await cluster.agent();
	const ztunnel = cluster.ztunnel();
	await eventually('all are enabled', () => [good, bad, gone].every(({key}) => cluster.redirection(key) === 'enabled'));
	t.deepEqual(works(good, bad, gone), ['ok', 'ok', 'ok']);
	await first.running.stop('SIGKILL');
	await ztunnel.until('it is disconnected', () => told(ztunnel).includes('disconnected'));

	cluster.put(bad, {annotations: {'ambient.istio.io/dns-capture': 'perhaps'}});
	cluster.api.delete('pods', gone.key);
	cluster.api.behave({status: 500, applies: ({path}) => path === '/api/v1/pods'});
	const before = told(ztunnel).length;
	// It may have met the end of the first agent twice.
	const heard = () => told(ztunnel).slice(before).filter(line => !line.endsWith('connected')).sort();
	const second = cluster.startAgent();
	await second.says(/ztunnel \(pid \d+\) connected/);
	await second.says(/500/);
	await sleep(1000);
	t.deepEqual(heard(), []);
	t.deepEqual(works(good, bad, gone), ['ok', 'ok', 'ok']);

	cluster.api.behave({});
	await second.ready();
	await ztunnel.until('it has a snapshot', () => heard().includes('snapshot 2'));
	t.deepEqual(heard(), [`add ${good.uid}`, `keep ${bad.uid}`, 'snapshot 2']);
	t.deepEqual(works(good, bad), ['ok', 'ok']);
	t.deepEqual(cluster.enrolled(), ['shop/bad', 'shop/good']);
	t.false(ztunnel.hasEnded, ztunnel.stderr);
});

test.serial('ztunnel is away, and a sandbox is made again in a namespace with the inode of the one before: the pod does not start, and is pending, until a ztunnel answers', async t => {
	t.timeout(300_000);
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	await cluster.agent(['--cni']);
	// Which inode the kernel gives out next is chance: one of many is enough.
	for (let batch = 0; batch < 20; batch++) {
		let ztunnel = cluster.ztunnel();
		const former = new Map<number, ClusterPod>();
		for (let index = 0; index < 8; index++) {
			const pod: ClusterPod = {key: `shop/p${batch}-${index}`, uid: crypto.randomUUID(), pod: cluster.world.pod(`p${batch}-${index}`)};
			cluster.put(pod, {ips: [], phase: 'Pending'});
			t.is((await cluster.cni('ADD', pod)).code, 0);
			former.set(statSync(pod.pod.netns).ino, pod);
		}

		await eventually('all are enabled', () => [...former.values()].every(({key}) => cluster.redirection(key) === 'enabled'));
		await ztunnel.stop('SIGKILL');
		for (const pod of former.values()) {
			await cluster.cni('DEL', pod);
			const {netnsName} = pod.pod;
			must('ip', 'netns', 'del', netnsName);
			t.teardown(() => {
				// The world takes it away.
				must('ip', 'netns', 'add', netnsName);
			});
		}

		for (let index = 0; index < 8; index++) {
			const again = cluster.world.pod(`again${batch}-${index}`);
			const before = former.get(statSync(again.netns).ino);
			if (before) {
				const pod = {...before, pod: again};
				const {code, error} = await cluster.cni('ADD', pod, {timeoutSeconds: 10});
				t.is(code, 1);
				t.regex(error!.msg, /ztunnel does not serve it yet: no ztunnel is connected/);
				await eventually('pending', () => cluster.redirection(pod.key) === 'pending');
				ztunnel = cluster.ztunnel();
				t.is((await cluster.cni('ADD', pod)).code, 0);
				await eventually('enabled', () => cluster.redirection(pod.key) === 'enabled');
				return;
			}
		}
	}

	t.fail('no inode was given out again');
});

test.serial('ztunnel\'s socket is removed while the agent runs: it is made again; what cannot be replaced makes the agent unready, and it says why', async t => {
	const cluster = await Cluster.create(t);
	const agent = await cluster.agent();
	const {zdsSocket} = cluster;
	unlinkSync(zdsSocket);
	await agent.says(/ztunnel's socket .* was gone: made again/);
	const ztunnel = cluster.ztunnel();
	await ztunnel.until('it is told', () => told(ztunnel).includes('snapshot 0'));

	unlinkSync(zdsSocket);
	writeFileSync(zdsSocket, '');
	await eventually('unready', async () => (await agent.get('/readyz')).status === 503);
	t.is((await agent.get('/readyz')).body, `ztunnel's socket cannot be served at ${zdsSocket} (bind ${zdsSocket}: EADDRINUSE: address already in use): stop the other agent that listens there, or remove what is there if it is no socket\n`);
	t.is((await agent.get('/healthz')).status, 200);
	unlinkSync(zdsSocket);
	await eventually('ready', async () => (await agent.get('/readyz')).status === 200);
	await agent.running.stop('SIGTERM');
	t.is(agent.running.child.exitCode, 0, agent.running.stderr);
});
