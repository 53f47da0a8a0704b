import {readFileSync} from 'node:fs';
import test, {type ExecutionContext} from 'ava';
import {captureByIptables, captureBySidestep} from '../helpers/capture.js';
import {eventually} from '../helpers/process.js';
import {startEnvoy, startHaproxy, startRedsocks} from '../helpers/proxies.js';
import {World, type Pod} from '../helpers/world.js';

type Start = (pod: Pod) => Promise<{seen: () => string}>;

const haproxy: Start = async pod => {
	const running = await startHaproxy(pod);
	return {seen: () => running.stdout};
};

const redsocks: Start = async pod => {
	const running = await startRedsocks(pod);
	return {seen: () => running.stderr};
};

const envoy: Start = async pod => {
	const {log} = await startEnvoy(pod);
	return {seen: () => readFileSync(log, 'utf8')};
};

/** A proxy in the client's pod relays to three destinations; the application cannot tell. */
async function relays(t: ExecutionContext, start: Start, capture: 'iptables' | 'sidestep', v6: boolean): Promise<void> {
	const world = World.create(t);
	const app = world.pod('app');
	const far = world.pod('far', {more: v6 ? ['fd77::aa', 'fd77::bb'] : ['10.77.0.170', '10.77.0.187']});
	const hosts = v6 ? [`[${far.ipv6}]`, '[fd77::aa]', '[fd77::bb]'] : [far.ipv4, '10.77.0.170', '10.77.0.187'];
	const destinations = hosts.map((host, index) => `${host}:${8080 + index}`);
	await far.server(...destinations);
	const proxy = await start(app);
	if (capture === 'iptables') {
		captureByIptables(app);
	} else {
		await captureBySidestep(app);
	}

	for (const destination of destinations) {
		const result = app.client(destination);
		t.is(result.outcome, 'ok', `${destination} ${JSON.stringify(result)}`);
		t.true(result.echo);
		t.is(result.peer, destination);
		t.is(result.hello!.server, destination);
		// Relayed: the server sees another connection than the one that the application made.
		t.not(result.hello!.peer, result.local);
	}

	const client = v6 ? app.ipv6 : app.ipv4;
	await eventually('the proxy logged the pod as its peer', () => proxy.seen().includes(client));
	if (capture === 'sidestep') {
		const [pod] = world.json<[{redirected: number; accepted: number}]>('pods');
		t.is(pod.redirected, 3);
		t.is(pod.accepted, 3);
	}
}

for (const capture of ['iptables', 'sidestep'] as const) {
	test(`HAProxy relays IPv4 to three destinations, captured by ${capture}`, relays, haproxy, capture, false);
	test(`redsocks relays IPv4 to three destinations, captured by ${capture}`, relays, redsocks, capture, false);
	test(`Envoy relays IPv4 to three destinations, captured by ${capture}`, relays, envoy, capture, false);
	test(`Envoy relays IPv6 to three destinations, captured by ${capture}`, relays, envoy, capture, true);
}
