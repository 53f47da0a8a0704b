import test from 'ava';
import {parsePodsFile} from '../../src/config/pods-file.js';
import {PodError} from '../../src/errors.js';
import {PREFIX_LOCAL, PREFIX_LOCALHOST, PREFIX_NOT_UNICAST, type PodInfo, type PodValue} from '../../src/maps/schema.js';
import type {Capture} from '../../src/redirect/capture.js';
import {KernelIndex, plan, type Change, type KernelState} from '../../src/redirect/plan.js';
import {compilePolicy, type PodFacts, type PodPolicy} from '../../src/redirect/policy.js';

const FACTS: PodFacts = {
	cookie: 1n, device: 4n, inode: 100n, addresses: ['10.0.0.2', 'fd00::2'],
	localRoutes: [{address: '10.0.0.2', bits: 32, isUnicast: true}, {address: '127.0.0.0', bits: 8, isUnicast: true}, {address: '10.0.0.255', bits: 32, isUnicast: false}, {address: 'fd00::2', bits: 128, isUnicast: true}],
	routes: [], interfaces: [], cgroups: [],
};

/** Another pod, with an address of its own. */
const OTHER: Partial<PodFacts> = {cookie: 2n, addresses: ['10.0.0.3'], localRoutes: [{address: '10.0.0.3', bits: 32, isUnicast: true}, {address: '127.0.0.0', bits: 8, isUnicast: true}]};

function policy(entry: object = {}, facts: Partial<PodFacts> = {}): PodPolicy {
	const [spec] = parsePodsFile(JSON.stringify({pods: [{name: 'a/b', netns: '/x', proxy: {port: 15_001}, exempt: {marks: ['0x539/0xfff']}, ...entry}]}), 'x');
	const {name, ips, wish} = spec!;
	return compilePolicy({name, ...(ips ? {ips} : {}), capture: (wish as {capture: Capture}).capture}, {...FACTS, ...facts});
}

const EMPTY: KernelState = {pods: new Map(), infos: new Map(), counters: new Set(), halfCounted: new Set(), prefixes: [], ports: [], exemptions: [], addresses: []};

/** The maps after the changes: a model of apply.ts. */
function carryOut(state: KernelState, changes: readonly Change[]): KernelState {
	const pods = new Map(state.pods);
	const infos = new Map(state.infos);
	const counters = new Set(state.counters);
	let prefixes = [...state.prefixes];
	let exemptions = [...state.exemptions];
	let ports = [...state.ports];
	let addresses = [...state.addresses];
	const same = (a: object, b: object) => JSON.stringify(Object.entries(a).map(String).sort()) === JSON.stringify(Object.entries(b).map(String).sort());
	for (const step of changes.flatMap(({steps}) => steps)) {
		switch (step.do) {
			case 'put prefix': { prefixes.push([step.key, step.value]); break; }
			case 'put exemption': { exemptions.push(step.key); break; }
			case 'put counters': { counters.add(step.cookie); break; }
			case 'put port': { ports.push([step.key, step.value]); break; }
			case 'put address': { addresses = [...addresses.filter(([key]) => !same(key, step.key)), [step.key, step.cookie]]; break; }
			case 'delete port': { ports = ports.filter(([key]) => !same(key, step.key)); break; }
			case 'delete address': { addresses = addresses.filter(([key]) => !same(key, step.key)); break; }
			case 'put info': { infos.set(step.cookie, {...step.info, enrolledAtMs: 5n, namespaceChanges: 0}); break; }
			case 'put pod': { pods.set(step.cookie, step.pod); break; }
			case 'delete pod': { pods.delete(step.cookie); break; }
			case 'delete info': { infos.delete(step.cookie); break; }
			case 'delete counters': { counters.delete(step.cookie); break; }
			case 'delete prefix': { prefixes = prefixes.filter(([key]) => !same(key, step.key)); break; }
			case 'delete exemption': { exemptions = exemptions.filter(key => !same(key, step.key)); break; }
		}
	}

	return {pods, infos, counters, halfCounted: new Set(), prefixes, ports, exemptions, addresses};
}

test('a proxy in the pod is reached at the pod\'s own addresses', t => {
	const {pod} = policy();
	t.deepEqual(pod.target4, {address: '10.0.0.2', source: '10.0.0.2', port: 15_001, inPod: 1, spread: 1});
	t.deepEqual(pod.target6, {address: 'fd00::2', source: 'fd00::2', port: 15_001, inPod: 1, spread: 0});
	t.is(pod.markCount, 1);
});

test('a proxy on loopback binds the pod\'s address, one elsewhere does not, and a family without one is refused', t => {
	t.deepEqual(policy({proxy: {port: 1, addresses: ['127.0.0.1']}}).pod.target4, {address: '127.0.0.1', source: '10.0.0.2', port: 1, inPod: 1, spread: 0});
	const {pod} = policy({proxy: {port: 1, addresses: ['10.9.9.9']}, exempt: {}});
	t.deepEqual(pod.target4, {address: '10.9.9.9', source: '10.0.0.2', port: 1, inPod: 0, spread: 0});
	t.is(pod.target6.address, '');
	t.is(policy({}, {addresses: ['10.0.0.2']}).pod.target6.address, '');
});

test('local routes become prefixes of the 16-byte form, with what no rule ever captures', t => {
	const prefixes = policy().prefixes.map(({address, bits, flags}) => `${address}/${bits} ${flags}`);
	for (const wanted of [
		`10.0.0.2/128 ${PREFIX_LOCAL}`, `127.0.0.0/104 ${PREFIX_LOCAL}`, `127.0.0.1/128 ${PREFIX_LOCAL | PREFIX_LOCALHOST}`, `10.0.0.255/128 ${PREFIX_NOT_UNICAST}`,
		`fd00::2/128 ${PREFIX_LOCAL}`, `::1/128 ${PREFIX_LOCAL | PREFIX_LOCALHOST}`, `224.0.0.0/100 ${PREFIX_NOT_UNICAST}`, `ff00::/8 ${PREFIX_NOT_UNICAST}`, '0.0.0.0/96 0',
	]) {
		t.true(prefixes.includes(wanted), `${wanted} in ${prefixes.join(', ')}`);
	}

	t.is(new Set(prefixes).size, prefixes.length);
});

test('what does not fit the namespace is refused', t => {
	t.throws(() => policy({ips: ['10.0.0.3']}), {instanceOf: PodError, message: /does not have the address 10\.0\.0\.3/});
	t.throws(() => policy({}, {addresses: []}), {instanceOf: PodError, message: /has no global address yet/});
	t.throws(() => policy({exempt: {}}), {instanceOf: PodError, message: /nothing is exempt/});
});

test('planning again after a plan was carried out gives nothing to do', t => {
	const wanted = [policy(), policy({name: 'c/d', exempt: {uids: [1, 2], gids: [3]}}, OTHER)];
	const state = carryOut(EMPTY, plan(new KernelIndex(EMPTY), wanted));
	t.is(state.pods.size, 2);
	t.deepEqual(plan(new KernelIndex(state), wanted), []);
});

test('lists are written under a fresh policy id before the one write that switches, and the old ones are deleted after it', t => {
	const state = carryOut(EMPTY, plan(new KernelIndex(EMPTY), [policy()]));
	const [change] = plan(new KernelIndex(state), [policy({exempt: {uids: [7]}})]);
	t.is(change!.kind, 'update');
	const kinds = change!.steps.map(step => step.do);
	const at = kinds.indexOf('put pod');
	t.true(kinds.lastIndexOf('put prefix') < at && kinds.lastIndexOf('put exemption') < at && kinds.indexOf('delete prefix') > at);
	const [old] = [...state.pods.values()];
	const put = change!.steps[at] as {pod: PodValue};
	t.not(put.pod.policy, old!.policy);
	const after = carryOut(state, [change!]);
	t.true(after.prefixes.every(([key]) => key.policy === put.pod.policy));
});

test('a change that leaves the lists alone is one write', t => {
	const state = carryOut(EMPTY, plan(new KernelIndex(EMPTY), [policy()]));
	const [change] = plan(new KernelIndex(state), [policy({proxy: {port: 15_002}})]);
	t.deepEqual(change!.steps.map(step => step.do), ['put pod']);
	const [renamed] = plan(new KernelIndex(state), [policy({name: 'new/name'})]);
	t.deepEqual(renamed!.steps.map(step => step.do), ['put info']);
});

test('a removed pod is out of capture first, and leaves nothing', t => {
	const state = carryOut(EMPTY, plan(new KernelIndex(EMPTY), [policy()]));
	const changes = plan(new KernelIndex(state), []);
	t.is(changes[0]!.steps[0]!.do, 'delete pod');
	t.deepEqual(carryOut(state, changes), EMPTY);
});

test('a pod that could not be read this time is kept', t => {
	const state = carryOut(EMPTY, plan(new KernelIndex(EMPTY), [policy()]));
	t.deepEqual(plan(new KernelIndex(state), [], new Set([1n])), []);
});

test('whatever a crash leaves of any change, the next plan makes right', t => {
	const states = [[], [policy()], [policy({exempt: {uids: [7], gids: [8]}})], [policy(), policy({name: 'c/d'}, OTHER)]];
	let cuts = 0;
	for (const from of states) {
		for (const to of states) {
			const start = carryOut(EMPTY, plan(new KernelIndex(EMPTY), from));
			const changes = plan(new KernelIndex(start), to);
			const steps = changes.flatMap(change => change.steps);
			for (let cut = 0; cut <= steps.length; cut++) {
				const broken = carryOut(start, [{kind: 'update', pod: '', cookie: 0n, steps: steps.slice(0, cut)}]);
				// Whoever is in pods at any moment has whole lists.
				for (const [cookie, value] of broken.pods) {
					const source = [...from, ...to].filter(candidate => candidate.cookie === cookie);
					const count = broken.prefixes.filter(([key]) => key.policy === value.policy).length;
					t.true(source.some(candidate => candidate.prefixes.length === count), `cut at ${cut}`);
				}

				const repaired = carryOut(broken, plan(new KernelIndex(broken), to));
				t.deepEqual(plan(new KernelIndex(repaired), to), []);
				t.deepEqual([...repaired.pods.keys()].sort(), to.map(({cookie}) => cookie).sort());
				t.is(repaired.prefixes.length, to.reduce((sum, {prefixes}) => sum + prefixes.length, 0));
				cuts++;
			}
		}
	}

	t.true(cuts > 100);
});

test('the time of enrolment stays through updates, and starts anew with a new enrolment', t => {
	const state = carryOut(EMPTY, plan(new KernelIndex(EMPTY), [policy()]));
	const info = [...state.infos.values()][0] as PodInfo;
	const renamed = carryOut(state, plan(new KernelIndex(state), [policy({name: 'x/y'})]));
	t.is([...renamed.infos.values()][0]!.enrolledAtMs, info.enrolledAtMs);
});

test('an address that moves from one pod to another in one plan is the new one\'s after it, in either order', t => {
	const old = policy();
	const has = (wanted: PodPolicy, ...addresses: PodPolicy['addresses']) => ({...wanted, addresses});
	const [moving] = old.addresses as [PodPolicy['addresses'][0]];
	const other = policy({name: 'c/d'}, OTHER);
	const state = carryOut(EMPTY, plan(new KernelIndex(EMPTY), [has(old, moving), other]));
	const wanted = [has(old), has(other, ...other.addresses, moving)];
	for (const order of [wanted, [...wanted].reverse()]) {
		const index = new KernelIndex(state);
		const changes = plan(index, order);
		const after = carryOut(state, changes);
		t.deepEqual(after.addresses.filter(([key]) => key === moving), [[moving, other.cookie]]);
		for (const change of changes) {
			index.record(change);
		}

		t.deepEqual(plan(index, order), []);
	}
});
