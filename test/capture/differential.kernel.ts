/**
The same client action in two sibling pods, one under Istio's real iptables rules, one under sidestep, with the same proxy in both: the application, the
proxy and the peer have to see the same, and the reference what its row of the contract says.
*/
import {isDeepStrictEqual} from 'node:util';
import test from 'ava';
import {PROBE_SOURCE, SIDECAR_ID, ambientRules, sidecarRules} from '../helpers/istio-rules.js';
import {must, type Running} from '../helpers/process.js';
import {World, type ClientResult, type DnsResult, type Pod, type ZtunnelLine} from '../helpers/world.js';
import {VARIANTS, type Case, type Expectation, type Variant} from './cases.js';

const FAR = {FARB4: '10.77.0.170', FARB6: 'fd77::aa', FARC4: '10.77.0.171', FARC6: 'fd77::ab'};
/** At the edges of an included range. */
const FAR_EDGES = ['10.77.0.175', '10.77.0.176', 'fd77::af', 'fd77::b0'];
const FAR_PORTS = [853, 8080, 8443, 9000, 15_001, 15_008];
const POD_PORTS = [8082, 8443, 9000, 15_002];
const SIDECAR_POD_PORTS = [15_008, 15_020, 15_021, 15_090];
/** That cases bind: none that the kernel would choose. */
const BOUND_PORTS = [20_123, 20_124];
const KNOWN_PORTS = new Set([9, 53, 5353, 8081, 15_006, 15_053, ...FAR_PORTS, ...POD_PORTS, ...SIDECAR_POD_PORTS, ...BOUND_PORTS]);
const LISTENERS: Readonly<Record<number, Expectation>> = {15_001: 'outbound', 15_006: 'inbound', 15_008: 'tunnel', 15_053: 'dns'};

interface Side {
	readonly pod: Pod;
	readonly proxy: Running | undefined;
	/** What the names in the cases stand for. */
	readonly addresses: Readonly<Record<string, string>>;
}

interface View {
	readonly where: Expectation;
	readonly outcome: string;
	readonly client: unknown;
	readonly proxy: unknown;
}

/** Puts the side's addresses in the place of their names. */
function fill({addresses}: Side, text: string): string {
	return text.replaceAll(/[A-Z]+[46](?!\w)/g, name => addresses[name] ?? name);
}

/** Names instead of addresses, and one word for every port that the kernel chose. */
function plain({pod, addresses}: Side, text: string): string {
	// Istio shows the node by an address of its own to ambient pods; under sidestep its true one is seen, as the README says.
	const node = [pod.world.node.ipv4, pod.world.node.ipv6, ...Object.values(PROBE_SOURCE)];
	const names = [...Object.entries(addresses), ...node.map(address => ['NODE', address] as const)];
	return names.reduce((named, [name, address]) => named.replaceAll(new RegExp(`(?<![\\w.])${address.replaceAll('.', '\\.')}(?![\\w.])`, 'g'), name), text)
		.replace(/:(\d+)$/, (whole, port) => KNOWN_PORTS.has(Number(port)) ? whole : ':RANDOM');
}

/** What the proxy said since the last call: it answers the signal after all that came before. */
async function proxyLines(proxy: Running): Promise<ZtunnelLine[]> {
	const before = proxy.stdout.length;
	proxy.child.kill('SIGUSR1');
	await proxy.until('the proxy has told everything', () => /^\{"accepted".*\n/m.test(proxy.stdout.slice(before)));
	const lines = proxy.lines<ZtunnelLine | {readonly accepted: number} | {readonly ready: true}>().filter(line => 'listener' in line);
	proxy.stdout = '';
	return lines;
}

function act(side: Side, from: Pod, {to, options = [], dns, as}: Case): ReadonlyArray<ClientResult | DnsResult> {
	const destinations = [to].flat().map(address => fill(side, address));
	const filled = options.map(option => fill(side, option));
	return dns ? from.dns(destinations, ['--timeout', '400', ...filled], as) : from.connections(destinations, ['--timeout', '1500', ...filled], as);
}

/** What everybody saw. */
async function look(side: Side, from: Pod, variant: Variant, action: Case): Promise<View> {
	const name = (text: string) => plain(side, text);
	// A connect that failed leaves the source bound under sidestep.
	const local = (each: ClientResult | DnsResult) => each.outcome !== 'ok' && each.peer === 'ENOTCONN' ? '' : name(each.local);
	const results = act(side, from, action);
	const lines = side.proxy ? await proxyLines(side.proxy) : [];
	const failure = results.find(({outcome}) => outcome !== 'ok')?.outcome;
	const missed = failure === undefined ? 'direct' : failure === 'ECONNREFUSED' ? 'refused' : 'fails';
	return {
		where: lines.length > 0 ? LISTENERS[lines[0]!.listener]! : missed,
		outcome: failure ?? 'ok',
		client: results.map(each => 'hello' in each ? {
			stage: each.stage, echo: each.echo, peer: name(each.peer), local: local(each), server: name(each.hello?.server ?? ''), serverSees: name(each.hello?.peer ?? ''),
		} : {
			peer: name(each.peer), local: local(each), answerFrom: name(each.answer_from), server: name(each.answer?.server ?? ''), serverSees: name(each.answer?.peer ?? ''),
		}),
		// Local addresses differ, as the README says: REDIRECT shows its target's, sidestep the pod's own or the original destination.
		proxy: lines.map(line => ({
			listener: line.listener, protocol: line.protocol, peer: name(line.peer), originalDestination: name(line.original_dst), upstreamLocal: name(line.upstream_local),
			...line.listener === 15_008 ? {local: name(line.local)} : {},
			// ztunnel takes the socket's own address where nobody knows another; Envoy does so only where the connection is to itself.
			...variant.mode === 'sidecar' && line.upstream_local ? {from: line.from} : {},
		})),
	};
}

/** In what a side is not as the table says. */
function unexpected(view: View, {expect, outcome = expect === 'refused' ? 'ECONNREFUSED' : 'ok'}: Pick<Case, 'expect' | 'outcome'>): boolean {
	return view.where !== expect || view.outcome !== outcome;
}

/** A second interface, right to the far pod. */
function connect(far: Pod, pod: Pod, number: number): Record<string, string> {
	const addresses = {NET4: `10.79.${number}.1`, NET6: `fd79:${number}::1`, NETOWN4: `10.79.${number}.2`, NETOWN6: `fd79:${number}::2`};
	must('ip', 'link', 'add', 'net1', 'netns', pod.netnsName, 'type', 'veth', 'peer', 'name', `net${number}`, 'netns', far.netnsName);
	for (const [netns, device, four, six] of [[far.netnsName, `net${number}`, addresses.NET4, addresses.NET6], [pod.netnsName, 'net1', addresses.NETOWN4, addresses.NETOWN6]] as const) {
		must('ip', '-n', netns, 'link', 'set', device, 'addrgenmode', 'none');
		must('ip', '-n', netns, 'addr', 'add', `${four}/24`, 'dev', device);
		must('ip', '-n', netns, 'addr', 'add', `${six}/64`, 'dev', device, 'nodad');
		must('ip', '-n', netns, 'link', 'set', device, 'up');
	}

	return addresses;
}

const host = (address: string) => address.includes(':') ? `[${address}]` : address;
const dualStack = (ports: readonly number[]) => ports.map(port => `[::]:${port}`);

async function serve(variant: Variant, pod: Pod, own: readonly string[]): Promise<void> {
	const explicit = ['0.0.0.0:8081', '[::1]:8081', `[${pod.ipv6}]:8081`];
	await pod.server(...explicit, ...dualStack([...POD_PORTS, ...variant.mode === 'sidecar' ? SIDECAR_POD_PORTS : []]));
	await pod.dnsserver(...['127.0.0.1', '127.0.0.53', '::1', ...own].map(address => `${host(address)}:53`), ...own.map(address => `${host(address)}:5353`));
}

function captureByIptables(variant: Variant, pod: Pod): void {
	const {mode, dns = false, ambient = {}, sidecar} = variant;
	if (mode === 'sidecar') {
		sidecarRules(pod, sidecar, {dns});
	} else {
		ambientRules(pod, {dns: ambient['dns-capture'] ? ambient['dns-capture'] === 'true' : dns, bypassInbound: ambient['bypass-inbound-capture'] === 'true'});
	}
}

function podEntry({mode, dns = false, ambient = {}, sidecar = {}}: Variant, pod: Pod): object {
	const annotations = {
		...Object.fromEntries(Object.entries(ambient).map(([name, value]) => [`ambient.istio.io/${name}`, value])),
		...Object.fromEntries(Object.entries(sidecar).map(([name, value]) => [`traffic.sidecar.istio.io/${name}`, value])),
	};
	return {name: `test/${pod.name}`, netns: pod.netns, mode, dns, annotations};
}

async function startProxy({mode, noProxy}: Variant, pod: Pod): Promise<Running | undefined> {
	if (noProxy) {
		return undefined;
	}

	return mode === 'sidecar' ? pod.ztunnel(['--sidecar'], {uid: SIDECAR_ID, gid: SIDECAR_ID}) : pod.ztunnel();
}

for (const variant of VARIANTS) {
	test.serial(`under sidestep everyone sees what they see under iptables: ${variant.title}`, async t => {
		t.timeout(120_000);
		const world = World.create(t);
		const far = world.pod('far', {more: [...Object.values(FAR), ...FAR_EDGES]});
		const pods = ['iptables', 'sidestep'].map((name, index) => {
			const second = {SECOND4: `10.77.0.${index + 201}`, SECOND6: `fd77::20${index + 1}`};
			const pod = world.pod(name, {more: Object.values(second)});
			return {pod, addresses: {FAR4: far.ipv4, FAR6: far.ipv6, OWN4: pod.ipv4, OWN6: pod.ipv6, ...FAR, ...second, ...variant.net1 ? connect(far, pod, index + 1) : {}}};
		});
		await far.server(...dualStack(FAR_PORTS));
		const resolvers = pods.flatMap(({addresses}) => Object.entries(addresses).filter(([name]) => /^(?:FAR|NET[46])/.test(name)).map(([, address]) => address));
		await far.dnsserver(...[...new Set(resolvers)].flatMap(address => [53, 5353].map(port => `${host(address)}:${port}`)));
		captureByIptables(variant, pods[0]!.pod);
		await world.agent([podEntry(variant, pods[1]!.pod)]);
		const sides: Side[] = [];
		for (const {pod, addresses} of pods) {
			const proxy = await startProxy(variant, pod);
			await serve(variant, pod, [pod.ipv4, pod.ipv6]);
			sides.push({pod, proxy, addresses});
		}

		const wrong: string[] = [];
		for (const action of variant.cases) {
			const views: View[] = [];
			for (const side of sides) {
				views.push(await look(side, {pod: side.pod, far, node: world.node}[action.from ?? 'pod'], variant, action));
			}

			const [reference, ours] = views as [View, View];
			const about = `${action.row} ${action.title}: iptables ${JSON.stringify(reference)}`;
			if (unexpected(reference, action)) {
				wrong.push(`${about} is not what the case expects`);
			}

			if (action.differs ? unexpected(ours, action.differs) : !isDeepStrictEqual(ours, reference)) {
				wrong.push(`${about}, sidestep ${JSON.stringify(ours)}`);
			}
		}

		t.deepEqual(wrong, []);
	});
}
