/**
Random policies and random flows: what the programs decide from the kernel's maps is what CAPTURE.md says, read plainly. By the program `explain`, which
shares its decision with the hooks. SIDESTEP_SEED repeats a run.
*/
import test from 'ava';
import {load, type Datapath} from '../../src/loader/datapath.js';
import {takeWriterLock} from '../../src/loader/lock.js';
import {PinLayout} from '../../src/loader/paths.js';
import {isIpv4Address} from '../../src/maps/address.js';
import type {PodPolicy} from '../../src/redirect/policy.js';
import {applyChange, readKernel} from '../../src/redirect/apply.js';
import type {Capture} from '../../src/redirect/capture.js';
import {plan} from '../../src/redirect/plan.js';
import {compilePolicy} from '../../src/redirect/policy.js';
import {explain} from '../../src/cli/read.js';
import {FACTS, drawCapture, drawFlow, randomOf, readContract, type Flow, type Outcome} from '../helpers/contract.js';
import {World} from '../helpers/world.js';

const POLICIES = 500;
const FLOWS = 60;
const COOKIE = 2n ** 40n;
const EXCLUDED_INTERFACE = 7;
const OTHER_INTERFACE = 8;

/** `redirected` and all that is left alone, in the contract's words. */
const OUTCOMES: Readonly<Record<string, Outcome>> = {redirected: 'outbound', redirected_inbound: 'inbound', redirected_dns: 'dns', steered: 'inbound'};

function policyOf(capture: Capture): PodPolicy {
	const host = (address: string) => ({address, bits: isIpv4Address(address) ? 32 : 128, isUnicast: true});
	return compilePolicy({name: 'test/drawn', capture: {...capture, exempt: {...capture.exempt, cgroups: []}}}, {
		cookie: COOKIE, device: 4n, inode: 1n,
		addresses: FACTS.ownAddresses,
		localRoutes: [...FACTS.ownAddresses.map(host), {address: '127.0.0.0', bits: 8, isUnicast: true}, host('::1'), {address: '127.255.255.255', bits: 32, isUnicast: false}],
		routes: [],
		interfaces: capture.excludeInterfaces.map(name => ({name, index: EXCLUDED_INTERFACE})),
		cgroups: [],
	});
}

function decide(datapath: Datapath, capture: Capture, flow: Flow): Outcome {
	const {direction, protocol, source, destination} = flow;
	// What the hooks let pass before they ask.
	if (protocol === 'udp' && (direction === 'in' || !capture.dns || destination.port !== 53)) {
		return 'pass';
	}

	const isBound = direction === 'in' || source.isBound;
	const pass = {client: source.address, server: destination.address, clientPort: 40_000, serverPort: destination.port};
	if (flow.fromNode && capture.inbound?.passNode) {
		datapath.maps.passes.set(pass, {reason: 'REASON_INBOUND_BYPASS_NODE'});
	}

	const {outbound, inbound = ''} = explain(datapath, {
		netns: COOKIE,
		source: isBound ? source.address : '', sourcePort: isBound ? 40_000 : 0,
		destination: destination.address === '::' ? '' : destination.address, destinationPort: destination.port,
		protocol: protocol === 'tcp' ? 6 : 17,
		mark: flow.mark, uid: flow.uid, gid: flow.gid,
		interface: flow.interfaceExcluded ? EXCLUDED_INTERFACE : OTHER_INTERFACE,
		inExemptCgroup: 0,
	});
	datapath.maps.passes.delete(pass);
	return OUTCOMES[direction === 'in' ? inbound : outbound] ?? 'pass';
}

test(`${POLICIES * FLOWS} flows under ${POLICIES} policies are decided as the contract says`, t => {
	const seed = Number(process.env['SIDESTEP_SEED'] ?? Date.now() % 1_000_000_007);
	t.log(`SIDESTEP_SEED=${seed}`);
	const random = randomOf(seed);
	const world = World.create(t);
	const lock = takeWriterLock(new PinLayout(world.bpffs, 2));
	const {datapath} = load(lock, {cgroup: world.cgroup});
	t.teardown(() => {
		datapath.close();
		lock.release();
	});

	const seen = new Map<string, number>();
	for (let policy = 0; policy < POLICIES; policy++) {
		const capture = drawCapture(random);
		// Each replaces the one before, as a change on a live pod does.
		for (const change of plan(readKernel(datapath.maps), [policyOf(capture)])) {
			applyChange(datapath, change);
		}

		for (let index = 0; index < FLOWS; index++) {
			const flow = drawFlow(random, capture);
			const wanted = readContract(capture, FACTS, flow);
			const decided = decide(datapath, capture, flow);
			if (decided !== wanted) {
				t.is(decided, wanted, `seed ${seed}, policy ${policy}, flow ${index}: ${JSON.stringify(flow)} under ${JSON.stringify(capture).slice(0, 3000)}`);
			}

			const key = `${capture.mode} ${flow.direction} ${wanted}`;
			seen.set(key, (seen.get(key) ?? 0) + 1);
		}
	}

	t.log(Object.fromEntries([...seen].sort()));
	for (const key of ['ambient out outbound', 'ambient out dns', 'ambient out pass', 'ambient in inbound', 'ambient in pass', 'sidecar out outbound', 'sidecar out inbound', 'sidecar out dns', 'sidecar out pass', 'sidecar in inbound', 'sidecar in pass', 'proxy out outbound', 'proxy out pass']) {
		t.true((seen.get(key) ?? 0) > 50, `${key} was drawn ${seen.get(key) ?? 0} times`);
	}
});
