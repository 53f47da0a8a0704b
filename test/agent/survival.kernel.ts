import {existsSync, readFileSync, readdirSync} from 'node:fs';
import {fileURLToPath} from 'node:url';
import test from 'ava';
import {PROGRAMS, openDatapath} from '../../src/loader/datapath.js';
import {PROXY_MARK, PROXY_PORT, captureBySidestep, podEntry} from '../helpers/capture.js';
import {eventually} from '../helpers/process.js';
import {World, type ManyResult} from '../helpers/world.js';

const TELL_MEMORY = fileURLToPath(new URL('../helpers/tell-memory.js', import.meta.url));

interface PodRow {
	readonly name: string;
	readonly redirected: number;
	readonly accepted: number;
}

test('the agent is killed in the middle of 2,000 connections: none fails, and the next agent adopts the pins and goes on', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	const destinations = [`${far.ipv4}:8080`, `[${far.ipv6}]:8080`];
	await far.server(...destinations);
	await pod.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	const agent = await captureBySidestep(pod);
	const links = () => world.json<{programs: Array<{id: number}>}>('status').programs.map(({id}) => id);
	const before = links();

	const held = pod.startClients(destinations, ['--count', '20', '--hold']);
	const load = pod.startClients(destinations, ['--count', '2000', '--parallel', '20']);
	await eventually('some connections were made', () => world.json<PodRow[]>('pods')[0]!.accepted > 200);
	await agent.running.stop('SIGKILL');
	t.false(load.hasEnded, 'the load still runs when the agent dies');
	t.is(world.json<{agent: string}>('status').agent.split(' ')[0], 'not');

	const next = world.startAgent();
	await next.ready();
	await next.says(/programs adopted/);
	t.deepEqual(links(), before, 'the same programs run');
	t.false(/enrol|update|remove/.test(next.running.stderr), `nothing had to be changed: ${next.running.stderr}`);

	await load.ended;
	t.like(load.lines<ManyResult>().at(-1), {ok: 2000, failed: 0, wrong_peer: 0});
	held.child.stdin!.write('still there?\n');
	await held.until('held connections answer', () => held.stdout.includes('"round":1'));
	t.like(held.lines<{ok?: number}>().at(-1), {round: 1, ok: 20, failed: 0});
	const [row] = world.json<PodRow[]>('pods');
	t.is(row!.accepted, 2020);
	t.is(row!.redirected, 2020);
});

test('SIGTERM leaves capture in place; unload takes it all away, and refuses while an agent runs', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await far.server(`${far.ipv4}:8080`);
	await pod.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	const agent = await captureBySidestep(pod);
	const direct = () => {
		const result = pod.client(`${far.ipv4}:8080`);
		t.is(result.outcome, 'ok');
		return result.hello!.peer === result.local;
	};

	const refused = world.sidestep('unload');
	t.is(refused.code, 1);
	t.regex(refused.stderr, /another sidestep writes/);
	t.false(direct());

	t.is(await agent.running.stop('SIGTERM'), 0);
	t.false(direct());
	const unloaded = world.sidestep('unload');
	t.is(unloaded.code, 0, unloaded.stderr);
	t.true(direct());
	t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), []);
	t.regex(world.sidestep('unload').stdout, /nothing is loaded/);
	t.is(world.sidestep('status').code, 1);
});

test('two agents at once: the second says so and changes nothing', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	await captureBySidestep(pod);
	const second = world.startAgent();
	t.is(await second.running.ended, 1);
	t.regex(second.running.stderr, /another sidestep writes to .*: stop that agent first/);
	t.is(world.json<PodRow[]>('pods').length, 1);
});

test('what somebody changes in the maps is repaired at the next resync', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	const agent = await world.agent([podEntry(pod)], ['--resync', '200']);
	const datapath = openDatapath(world.bpffs);
	t.teardown(() => {
		datapath.close();
	});
	const [cookie, value] = datapath.maps.pods.entries()[0]!;
	datapath.maps.pods.delete(cookie);
	await eventually('the pod is enrolled again', () => datapath.maps.pods.get(cookie) !== undefined);
	const mark = agent.running.stderr.length;
	// An entry of a policy that no pod names, as a crash would leave it, and a prefix that is missing.
	datapath.maps.prefixes.set({bits: 160, policy: 77, address: '10.1.1.1'}, {flags: 1});
	datapath.maps.pods.set(99n, {...datapath.maps.pods.get(cookie)!});
	await agent.says(/remove netns 99/, mark);
	await eventually('the left-over entry is gone', () => datapath.maps.prefixes.entries().every(([key]) => key.policy !== 77));
	t.is(datapath.maps.pods.entries().length, 1);
	t.true(value.policy > 0);
});

test('an address that a pod gets later is passed as its own, after the next resync', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	const agent = await world.agent([podEntry(pod)], ['--resync', '200']);
	await pod.server('0.0.0.0:8081');
	pod.must('ip', 'addr', 'add', '10.77.0.200/24', 'dev', 'eth0');
	await agent.says(/update test\/pod/);
	t.is(pod.client('10.77.0.200:8081').outcome, 'ok');
});

test('1,000 times a pod is added and removed: no map entry, descriptor or memory is left behind', async t => {
	t.timeout(600_000);
	const world = World.create(t);
	const pods = [world.pod('a'), world.pod('b')];
	world.writePods([]);
	// As in the image, so that memory that was freed is used again and resident memory tells something.
	const agent = world.startAgent([], ['env', `NODE_OPTIONS=--max-semi-space-size=1 --import=${TELL_MEMORY}`, 'MALLOC_ARENA_MAX=1']);
	await agent.ready();
	const {pid} = agent.running.child;
	const fds = () => readdirSync(`/proc/${pid}/fd`).length;
	const memory = async () => {
		const from = agent.running.stderr.length;
		const said = () => /^memory (\d+)\n/m.exec(agent.running.stderr.slice(from))?.[1];
		agent.running.child.kill('SIGUSR2');
		await agent.running.until('it has collected its garbage', () => said() !== undefined);
		return {held: Number(said()), resident: 1024 * Number(/^RssAnon:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))![1])};
	};

	const cycle = async (count: number) => {
		for (let index = 0; index < count; index++) {
			const from = agent.running.stderr.length;
			world.writePods([podEntry(pods[index % 2]!)]);
			await agent.says(/enrol test/, from);
			const middle = agent.running.stderr.length;
			world.writePods([]);
			await agent.says(/remove test/, middle);
			if (index % 50 === 0) {
				// Or what is resident says how much garbage there once was.
				await memory();
			}
		}
	};

	await cycle(300);
	const before = {fds: fds(), ...await memory()};
	const count = 700;
	await cycle(count);
	const after = {fds: fds(), ...await memory()};
	t.log(`before ${JSON.stringify(before)}, after ${JSON.stringify(after)}`);
	await eventually('no descriptor is left open', () => fds() <= before.fds);
	// In bytes for each time. Some hundred are of functions that are still being compiled.
	const growth = (part: 'held' | 'resident') => (after[part] - before[part]) / count;
	t.true(growth('held') < 1000, `JavaScript holds ${growth('held')} bytes more each time`);
	t.true(growth('resident') < 2500, `${growth('resident')} bytes more are resident each time`);
	for (const {name, entries} of world.json<Array<{name: string; entries?: number}>>('map', 'list')) {
		if (name !== 'build' && name !== 'node' && entries !== undefined) {
			t.is(entries, 0, name);
		}
	}

	t.is(world.json<{programs: unknown[]}>('status').programs.length, PROGRAMS.length);
	// The agent holds no namespace: deleting the pods' ends them.
	for (const pod of pods) {
		t.true(existsSync(pod.netns));
	}

	const inode = pods[0]!.must('readlink', '/proc/self/ns/net').trim();
	t.false(readdirSync(`/proc/${pid}/fd`).some(fd => {
		try {
			return readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'utf8').includes(inode);
		} catch {
			return false;
		}
	}));
});

test('metrics, health and readiness tell what happened', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await far.server(`${far.ipv4}:8080`);
	await pod.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	const agent = await captureBySidestep(pod);
	pod.client(`${far.ipv4}:8080`);
	pod.client('127.0.0.1:1');
	const {status, body} = await agent.get('/metrics');
	t.is(status, 200);
	for (const line of [
		'sidestep_redirects_total{pod="test/pod",to="outbound"} 1',
		'sidestep_bypasses_total{pod="test/pod",reason="local"} 1',
		'sidestep_bypasses_total{pod="test/pod",reason="mark"} 1',
		'sidestep_accepts_total{pod="test/pod"} 1',
		'sidestep_map_entries{map="pods"} 1',
		'sidestep_map_capacity{map="pods"} 1024',
		'sidestep_pods{state="enrolled"} 1',
		'sidestep_reconcile_errors_total{kind="pod"} 0',
	]) {
		t.true(body.split('\n').includes(line), `${line}\n${body}`);
	}

	t.regex(body, /sidestep_program_runs_total\{program="connect4"\} \d+/);
	t.is((await agent.get('/healthz')).status, 200);
	world.writePods([podEntry(pod), {...podEntry(pod), name: 'gone', netns: '/run/netns/never-there'}]);
	await eventually('readyz says what is wrong', async () => {
		const ready = await agent.get('/readyz');
		return ready.status === 503 && /pod gone: its network namespace .* does not exist/.test(ready.body);
	});
	t.is((await agent.get('/healthz')).status, 200);
	t.is((await agent.get('/nothing')).status, 404);
});
