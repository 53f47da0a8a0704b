/** What the manifests suppose of the agent, beside an agent that runs. */
import {once} from 'node:events';
import {request} from 'node:http';
import path from 'node:path';
import test, {type ExecutionContext} from 'ava';
import {AMBIENT, Cluster, NODE} from '../helpers/cluster.js';
import {eventually, run} from '../helpers/process.js';
import type {RequestRecord} from '../kubernetes/fake-server.js';
import {expressions} from './expressions.js';
import {object, objects} from './rendered.js';

/** Added by Prometheus, from the PodMonitor. */
const TARGET_LABELS = ['node', 'job', 'instance', 'namespace'];

async function clusterWithPod(t: ExecutionContext): Promise<Cluster> {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	await cluster.pod('shop/web');
	return cluster;
}

test('every metric, label and label value that rules and dashboard ask for is served, and promtool finds nothing to say about them', async t => {
	const cluster = await clusterWithPod(t);
	const agent = await cluster.agent(['--cni']);
	const {body} = await agent.get('/metrics');
	const lint = run('promtool', ['check', 'metrics'], {input: body});
	t.is(lint.code, 0, lint.stdout + lint.stderr);

	const labels = new Map<string, Map<string, Set<string>>>();
	for (const [, name, pairs = ''] of body.matchAll(/^(\w+)(?:\{(.*)\})? \S+$/gm)) {
		const known = labels.get(name!) ?? new Map<string, Set<string>>();
		labels.set(name!, known);
		for (const [, label, value] of pairs.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
			known.set(label!, (known.get(label!) ?? new Set()).add(value!));
		}
	}

	t.true(labels.size > 40, body);
	for (const {where, text} of expressions()) {
		const used = [...text.matchAll(/\b((?:sidestep_\w+)|up)\b(?:\{([^}]*)\})?/g)];
		t.true(used.length > 0, where);
		for (const [, name, matchers = ''] of used.filter(([, name]) => name !== 'up')) {
			t.true(labels.has(name!), `${where}: ${name} is not served`);
			for (const [, label, operator, value] of matchers.matchAll(/(\w+)(=~|=)"([^"]*)"/g)) {
				const values = labels.get(name!)!.get(label!);
				t.true(values !== undefined || TARGET_LABELS.includes(label!), `${where}: ${name} has no label ${label}`);
				for (const wanted of operator === '=' ? [value!] : value === '.*' ? [] : value!.split('|')) {
					t.true(values?.has(wanted), `${where}: ${name} has no ${label}="${wanted}"`);
				}
			}
		}

		const grouped = [...text.matchAll(/\b(?:by|on) \(([^)]*)\)/g)].flatMap(([, list]) => list!.split(/,\s*/));
		const there = new Set([...TARGET_LABELS, ...used.flatMap(([, name]) => [...labels.get(name!)?.keys() ?? []])]);
		t.deepEqual(grouped.filter(label => !there.has(label)), [], where);
	}
});

test('the ClusterRole allows what the agent asks of the API server, and nothing that it never asks', async t => {
	const cluster = await clusterWithPod(t);
	const {api} = cluster;
	await cluster.pod('shop/wrong', {annotations: {'ambient.istio.io/dns-capture': 'perhaps'}});
	const agent = await cluster.agent(['--cni']);
	await eventually('an event, and an annotation', () => api.events.length > 0 && cluster.redirection('shop/web') === 'pending');
	// Of a namespace that is not known yet, and with a uid that the cache does not have.
	await cluster.pod('new/pod');
	for (const who of [{PodName: 'pod', PodNamespace: 'new', PodUid: ''}, {PodName: 'web', PodNamespace: 'shop', PodUid: 'another'}]) {
		const call = request({socketPath: cluster.cniSocket, path: '/cmdadd', method: 'POST'});
		call.end(JSON.stringify({Netns: '/run/netns/none', ContainerId: 'c', IPs: [], ...who}));
		await once(call, 'response');
	}

	await agent.running.stop();

	const {rules} = object<{rules: ReadonlyArray<{apiGroups: string[]; resources: string[]; verbs: string[]}>}>(objects('overlays/ambient'), 'ClusterRole');
	const granted = rules.flatMap(({apiGroups, resources, verbs}) => apiGroups.flatMap(group => resources.flatMap(resource => verbs.map(verb => path.join(group || 'core', resource, verb)))));
	t.deepEqual([...new Set(api.history.map(record => asked(record)))].sort(), granted.sort());
	t.true(api.requests('/api/v1/pods').filter(({path: target}) => target === '/api/v1/pods').every(({query}) => query.get('fieldSelector') === `spec.nodeName=${NODE}`));
});

/** group/resource[/subresource]/verb, as the API server's authorizer sees it. */
function asked({method, path: target, isWatch}: RequestRecord): string {
	const [, core, group, rest] = /^\/(?:(api)|apis\/([^/]+))\/[^/]+\/(.*)$/.exec(target)!;
	// namespaces/NAME alone is a namespace, with more behind it where that is.
	const [resource, name, subresource] = /^namespaces\/[^/]+\/(.+)$/.exec(rest!)?.[1]!.split('/') ?? rest!.split('/');
	const verb = {GET: isWatch ? 'watch' : name === undefined ? 'list' : 'get', PATCH: 'patch', POST: 'create'}[method];
	return path.join(core ? 'core' : group!, resource!, subresource ?? '', verb!);
}
