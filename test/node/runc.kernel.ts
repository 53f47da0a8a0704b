/** Containers made by runc, with cgroups as a kubelet names them: found, captured, restarted and forgotten. */
import {randomUUID} from 'node:crypto';
import {existsSync, readFileSync, readlinkSync} from 'node:fs';
import test from 'ava';
import {STATIC_POD_HASH} from '../../src/kubernetes/objects.js';
import {AMBIENT, Cluster, type ClusterPod} from '../helpers/cluster.js';
import {eventually} from '../helpers/process.js';
import {Runc, type Container} from '../helpers/runc.js';
import type {Pod, ZtunnelLine} from '../helpers/world.js';

type CgroupOf = (uid: string) => (id: string) => string;

/** By cgroup driver and quality of service; what is guaranteed has no directory of its own. */
const CGROUPS: Readonly<Record<string, CgroupOf>> = {
	'cgroupfs-guaranteed': uid => id => `kubepods/pod${uid}/${id}`,
	'cgroupfs-burstable': uid => id => `kubepods/burstable/pod${uid}/${id}`,
	'cgroupfs-besteffort': uid => id => `kubepods/besteffort/pod${uid}/${id}`,
	'systemd-guaranteed': uid => id => `kubepods.slice/kubepods-pod${uid.replaceAll('-', '_')}.slice/cri-containerd-${id}.scope`,
	'systemd-burstable': uid => id => `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod${uid.replaceAll('-', '_')}.slice/cri-containerd-${id}.scope`,
	'systemd-besteffort': uid => id => `kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod${uid.replaceAll('-', '_')}.slice/crio-${id}.scope`,
};
const BURSTABLE = CGROUPS['cgroupfs-burstable']!;

interface RuncPod extends ClusterPod {
	/** Joins the pod's network namespace; others join the pause container's. */
	readonly pause: Container;
	readonly app: Container;
	readonly cgroup: (id: string) => string;
}

/** Its sandbox, then a container in it, as a runtime makes them. The API does not know it. */
async function pod(cluster: Cluster, runc: Runc, key: string, {uid = randomUUID() as string, cgroupOf = BURSTABLE, network = cluster.world.pod(key.replace('/', '-')), cgroupUid = uid}: {
	readonly uid?: string; readonly cgroupOf?: CgroupOf; readonly network?: Pod; readonly cgroupUid?: string;
} = {}): Promise<RuncPod> {
	const cgroup = cgroupOf(cgroupUid);
	const pause = await runc.container({netns: network.netns, cgroup});
	const app = await runc.container({netns: pause.netns, cgroup});
	return {key, uid, pod: network, pause, app, cgroup};
}

/** A connection from inside of a container goes to the stand-in for ztunnel first, and arrives. */
async function isCaptured(lines: () => readonly ZtunnelLine[], from: Container, {pod: network}: ClusterPod, to: string): Promise<boolean> {
	const before = lines().length;
	const {code, stdout, stderr} = from.exec(`echo hello | nc ${to.replace(':', ' ')}`);
	if (code !== 0 || !stdout.includes('"server"')) {
		throw new Error(`nc to ${to} in ${from.id}: ${code} ${stdout}${stderr}`);
	}

	const isSeen = () => lines().slice(before).some(({listener, peer, original_dst: original}) => listener === 15_001 && original === to && peer.startsWith(`[::ffff:${network.ipv4}]:`));
	// ztunnel prints when a connection is accepted, before it relays.
	return isSeen() || eventually('the line arrives', isSeen, 1000).then(() => true, () => false);
}

async function enabled(cluster: Cluster, ...keys: readonly string[]): Promise<void> {
	await eventually(`enabled: ${keys.join(', ')}\n${cluster.enrolled().join(', ')}`, () => keys.every(key => cluster.redirection(key) === 'enabled'));
}

async function made(t: {teardown(clean: () => void | Promise<void>): void}) {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const runc = new Runc(cluster.world);
	const far = cluster.world.pod('far');
	const server = `${far.ipv4}:8080`;
	await far.server(server);
	const ztunnel = cluster.ztunnel();
	return {
		cluster, runc, server,
		captures: async (from: Container, of: ClusterPod) => isCaptured(() => ztunnel.lines<ZtunnelLine>().filter(line => 'listener' in line), from, of, server),
	};
}

test('pods are found by what runc makes of a kubelet\'s cgroup paths, and captured', async t => {
	const {cluster, runc, captures} = await made(t);
	const pods: RuncPod[] = [];
	for (const [name, cgroupOf] of Object.entries(CGROUPS)) {
		pods.push(await pod(cluster, runc, `shop/${name}`, {cgroupOf}));
		cluster.put(pods.at(-1)!);
	}

	// A pod of a file has another uid in the API.
	const hash = randomUUID().replaceAll('-', '');
	pods.push(await pod(cluster, runc, 'shop/static', {cgroupUid: hash}));
	cluster.put(pods.at(-1)!, {annotations: {[STATIC_POD_HASH]: hash}});

	for (const {key, pause, app, uid, cgroup} of pods) {
		for (const {pid, id} of [pause, app]) {
			const text = readFileSync(`/proc/${pid}/cgroup`, 'utf8');
			const below = `/${cluster.world.id}/${cgroup(id)}`;
			t.regex(text, new RegExp(`^\\d+:pids:${below}$`, 'm'), `${key} ${uid}: the hierarchies of version 1`);
			t.regex(text, new RegExp(`^0::${below}$`, 'm'), `${key} ${uid}: that of version 2`);
		}
	}

	await cluster.agent();
	t.deepEqual(cluster.enrolled(), pods.map(({key}) => key).sort());
	await enabled(cluster, ...pods.map(({key}) => key));
	for (const one of pods) {
		t.true(await captures(one.app, one), one.key);
	}
});

test('a container that is killed, deleted and run again is captured as before, and so is the pod when its pause container alone has ended', async t => {
	const {cluster, runc, captures} = await made(t);
	const agent = await cluster.agent(['--resync', '200']);
	const web = await pod(cluster, runc, 'shop/web');
	cluster.put(web);
	await enabled(cluster, 'shop/web');
	const before = agent.running.stderr.length;
	t.is(web.app.kill(), 0);
	await web.app.running.ended;
	web.app.delete();
	const second = await runc.container({netns: web.pause.netns, cgroup: web.cgroup});
	t.true(await captures(second, web));
	web.pause.delete();
	await agent.rounds(3);
	t.true(await captures(second, web));
	// The crash of all of them: for a moment there is no process at all.
	second.delete();
	await agent.rounds(3);
	t.deepEqual(cluster.enrolled(), ['shop/web']);
	t.true(await captures(await runc.container({netns: web.pod.netns, cgroup: web.cgroup}), web));
	t.notRegex(agent.running.stderr.slice(before), /remove|enrol/);
});

test('a container with a network namespace of its own, and the pod\'s address in it, is not taken for the pod', async t => {
	const {cluster, runc, captures} = await made(t);
	const web = await pod(cluster, runc, 'shop/web');
	const own = await runc.container({netns: web.pause.netns, cgroup: web.cgroup, script: `exec unshare -n sh -c 'ip link set lo up; ip addr add ${web.pod.ipv4}/32 dev lo; echo unshared; sleep 1000'`});
	const bare = await runc.container({netns: web.pause.netns, cgroup: web.cgroup, script: 'exec unshare -n sh -c \'echo unshared; sleep 1000\''});
	for (const {running} of [own, bare]) {
		await running.until('it has its own namespace', () => running.stdout.includes('unshared'));
	}

	t.not(readlinkSync(own.netns), readlinkSync(web.pause.netns));
	cluster.put(web, {ips: [web.pod.ipv4]});
	const agent = await cluster.agent(['--resync', '200']);
	await enabled(cluster, 'shop/web');
	t.true(await captures(web.app, web));
	// The oldest process that is left has no address of the pod.
	const last = await runc.container({netns: web.pause.netns, cgroup: web.cgroup});
	for (const ended of [own, web.pause, web.app]) {
		ended.delete();
		await eventually('it has ended', () => !existsSync(ended.netns));
	}

	await agent.rounds(3);
	t.true(await captures(last, web));
	t.notRegex(agent.running.stderr, /remove|pod shop\/web: /);
	t.deepEqual(cluster.enrolled(), ['shop/web']);
});

test('a sandbox that is replaced: the new namespace is captured, the old one forgotten; and all of a pod that is deleted', async t => {
	const {cluster, runc, captures} = await made(t);
	const agent = await cluster.agent();
	const first = await pod(cluster, runc, 'shop/web');
	cluster.put(first);
	await enabled(cluster, 'shop/web');
	const [was] = cluster.world.json<ReadonlyArray<{netns: number}>>('pods');
	first.app.delete();
	first.pause.delete();
	const second = await pod(cluster, runc, 'shop/web', {uid: first.uid, network: cluster.world.pod('again')});
	cluster.put(second);
	await eventually('the new one is captured', () => cluster.world.json<ReadonlyArray<{netns: number; ips: string}>>('pods').some(({ips}) => ips.startsWith(second.pod.ipv4)));
	const pods = cluster.world.json<ReadonlyArray<{netns: number}>>('pods');
	t.is(pods.length, 1);
	t.not(pods[0]!.netns, was!.netns);
	await agent.says(/remove shop\/web/);
	await eventually('ztunnel has the new one', async () => captures(second.app, second));
	cluster.api.delete('pods', 'shop/web');
	await eventually('nothing is left', () => cluster.enrolled().length === 0);
	t.false(await captures(second.app, second));
});
